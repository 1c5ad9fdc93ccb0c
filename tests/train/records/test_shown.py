"""What a run shows people: histograms and predictions in TensorBoard, and its final report."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from maas_ray.cli.training import runs as list_runs
from maas_ray.data.loading.open import open_rows
from maas_ray.data.stored.dataset import Dataset
from maas_ray.decoding.tokenizer import Tokenizer
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.evaluation.predictions import MAX_NEW_TOKENS, show_samples
from maas_ray.train.ranks.stopwatch import Stopwatch
from maas_ray.train.records.report import JSON, PNG, FinalState, commit_report, find_part
from maas_ray.train.records.runs import Runs
from tests.support.small_runs import make_run

CPU = torch.device("cpu")


class _Repeats(nn.Module):
    """A language model that predicts the token three positions before."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.one_hot(rows.roll(2, dims=1), self.vocab_size).double()


def _rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_a_language_model_continues_each_row_from_its_middle(file_store: ObstoreStore, tmp_path: Path) -> None:
    _, dataset = make_run(file_store, tmp_path, "decoder")
    rows = open_rows(dataset, "validation")
    shown = show_samples(_Repeats(dataset.features.num_outputs), rows, dataset, 3, CPU)
    first = rows.take(np.arange(3), np.arange(3)).columns[0]
    middle = first.shape[1] // 2
    assert middle <= MAX_NEW_TOKENS
    decode = Tokenizer(dataset.tokenizer()).decode
    header, _, *lines = shown.splitlines()
    assert header == "| row | text | continuation | predicted |"
    assert len(lines) == 3
    for number, (line, row) in enumerate(zip(lines, first.tolist(), strict=True)):
        expected = row[:middle]
        while len(expected) < len(row):
            expected.append(expected[-3])
        cells = (decode(row[:middle]), decode(row[middle:]), decode(expected[middle:]))
        assert line == f"| {number} | " + " | ".join(cell.replace("\n", "↵") for cell in cells) + " |"


class _Fixed(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *columns: Tensor) -> Tensor:
        assert not self.training
        return self.logits[: len(columns[0])]


def test_classes_are_shown_with_their_probabilities(file_store: ObstoreStore, tmp_path: Path) -> None:
    _, dataset = make_run(file_store, tmp_path, "mlp")
    rows = open_rows(dataset, "validation")
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).expand(64, 4)
    shown = show_samples(_Fixed(logits), rows, dataset, 64, CPU)
    targets = rows.take(np.arange(len(rows)), np.arange(len(rows))).target.tolist()
    assert _rows_of(shown)[0] == ["row", "target", "predicted"]
    assert [line[1:] for line in _rows_of(shown)[2:]] == [
        [str(target), "3 0.400, 2 0.300, 1 0.200"] for target in targets
    ]


def test_hidden_tokens_are_shown_with_their_predictions(file_store: ObstoreStore, tmp_path: Path) -> None:
    _, dataset = make_run(file_store, tmp_path, "encoder")
    rows = open_rows(dataset, "validation")
    batch = rows.take(np.arange(2), np.arange(2))
    right = nn.functional.one_hot(batch.target.clamp(min=0), dataset.features.num_outputs).float()
    for line in _rows_of(show_samples(_Fixed(right), rows, dataset, 2, CPU))[2:]:
        assert line[1] == line[2]


def test_time_is_counted_by_phase_over_attempts() -> None:
    now = [0.0]
    watch = Stopwatch("starting", clock=lambda: now[0])
    watch.add({"training": 100.0, "starting": 1.0})
    now[0] = 2.0
    watch.enter("training")
    now[0] = 5.0
    with watch.phase("validation"):
        now[0] = 9.0
    now[0] = 10.0
    assert watch.seconds() == {"starting": 3.0, "training": 104.0, "validation": 4.0}


def _finished(store: ObstoreStore, directory: Path) -> Dataset:
    spec, dataset = make_run(store, directory, "mlp", run="r", steps=4)
    runs = Runs(store)
    runs.create(spec, dataset.digest, "0123abc")
    runs.record("r", {"type": "unvalidated", "step": 2, "error": "no memory"})
    runs.record("r", {"type": "unvalidated", "step": 4, "error": "no memory"})
    runs.record("r", {"type": "validated", "step": 4, "metrics": {"validation_accuracy": 0.75}})
    runs.record("r", {"type": "finished", "step": 4, "reason": "early stopping"})
    return dataset


HISTORY: list[dict[str, Any]] = [
    {"step": 2, "loss": 2.0, "lr": 0.1},
    {"step": 2, "validation": {"accuracy": 0.5, "loss": 3.0}},
    {"step": 4, "loss": 1.0, "lr": 0.05},
]


def test_a_run_lists_its_checkpoints_without_metrics_and_the_reasons(file_store: ObstoreStore, tmp_path: Path) -> None:
    _finished(file_store, tmp_path)
    run = Runs(file_store).get("r")
    assert (run.status, run.unvalidated) == ("finished", {2: "no memory"}), "step 4 was tried again"
    listed = list_runs(file_store.uri)
    assert listed.document[0]["unvalidated"] == {2: "no memory"}
    shown = StringIO()
    Console(width=200, file=shown).print(listed.view)
    assert "step 2 was not validated: no memory" in shown.getvalue()


def test_the_report_of_a_run_is_written_once_and_describes_it(file_store: ObstoreStore, tmp_path: Path) -> None:
    dataset = _finished(file_store, tmp_path)
    ended = FinalState(4, HISTORY, "DDP 2", {"training": 2.0, "validation": 1.0})
    committed = commit_report(file_store, "r", ended, [{"CPU": 8.0}])
    report = json.loads(Path(find_part(committed, JSON)).read_text())
    assert Path(find_part(committed, PNG)).read_bytes().startswith(b"\x89PNG")
    assert (report["git_commit"], report["data_digest"], report["layout"]) == ("0123abc", dataset.digest, "DDP 2")
    assert (report["status"], report["reason"], report["step"]) == ("finished", "early stopping", 4)
    assert report["unvalidated"] == {"2": "no memory"}
    assert report["curves"] == {
        "loss": [[2, 2.0], [4, 1.0]],
        "lr": [[2, 0.1], [4, 0.05]],
        "validation_accuracy": [[2, 0.5], [4, 0.75]],
        "validation_loss": [[2, 3.0]],
    }
    assert report["best"]["validation_accuracy"] == {"step": 4, "value": 0.75}
    assert report["best"]["loss"] == {"step": 4, "value": 1.0}
    assert report["samples_per_s"] == pytest.approx(4 * 12 / 2.0)
    assert {"torch", "ray", "python", "maas-ray"} <= report["versions"].keys()
    assert report["spec"]["run"] == "r"

    assert commit_report(file_store, "r", FinalState(4, []), []).digest == committed.digest, "it is written once"
    checked = fsck(file_store)
    assert (checked.problems, checked.orphans, checked.foreign) == ([], [], [])
