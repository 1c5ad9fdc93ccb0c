"""Comparing runs: metrics of each split, differences of specs, curves as text and as PNG."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.cli.app import app
from maas_ray.errors import NotFound, SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.compare import compare_runs, draw_comparison


def _run(store: ObstoreStore, name: str, losses: list[float], **changes: Any) -> None:
    fields: dict[str, Any] = {
        "run": name,
        "model": {"name": "mlp", "params": {"size": 1}},
        "data": {"uri": "rows.csv", "task": "classification"},
        "storage": {"uri": store.uri},
        **changes,
    }
    Runs(store).create(TrainSpec.model_validate(fields), "d" * 64, None)
    history: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, start=1):
        history.append({"step": step, "loss": loss, "lr": 0.1})
        history.append({"step": step, "validation": {"loss": loss + 0.5, "accuracy": 1 - loss / 10}})
    save(
        store,
        checkpoints_prefix(name),
        Snapshot(len(losses), len(losses), {"model.w": torch.ones(2)}, history=history),
    )


def test_metrics_differences_and_curves_are_compared(file_store: ObstoreStore) -> None:
    _run(file_store, "a", [3.0, 2.0, 1.0])
    _run(file_store, "b", [3.0, 2.5], optimizer={"lr": 0.5}, epochs=7)
    for value in (0.25, 0.75):  # the newest counts
        event = {"type": "evaluated", "split": "test", "step": 3, "metrics": {"accuracy": value}}
        Runs(file_store).record("a", event)
    compared = compare_runs(file_store, ["a", "b"])
    assert compared.differences == {"optimizer.lr": [0.001, 0.5], "epochs": [None, 7]}
    one, two = compared.runs
    assert one.metrics == {"loss": 1.0, "validation_loss": 1.5, "validation_accuracy": 0.9, "test_accuracy": 0.75}
    assert two.metrics["validation_loss"] == 3.0
    assert "test_accuracy" not in two.metrics
    assert one.curves["loss"] == [[1, 3.0], [2, 2.0], [3, 1.0]]
    picture = Image.open(BytesIO(draw_comparison(compared, ["loss", "validation_loss"])))
    assert picture.format == "PNG"
    assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_the_command_shows_them_and_writes_the_picture(file_store: ObstoreStore, tmp_path: Path) -> None:
    _run(file_store, "a", [3.0, 2.0, 1.0])
    _run(file_store, "b", [3.0, 2.5], optimizer={"lr": 0.5})
    command = ["compare", "a", "b", "--store", file_store.uri]
    picture = tmp_path / "curves.png"
    answer = CliRunner().invoke(app, [*command, "--png", str(picture)])
    assert answer.exit_code == 0, answer.output
    for text in ("optimizer.lr", "0.001", "validation_loss", "█▅▁", "differences of the specs"):
        assert text in answer.output
    with Image.open(picture) as image:
        assert image.format == "PNG"
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["differences"] == {"optimizer.lr": [0.001, 0.5]}


def test_what_cannot_be_compared_is_refused(file_store: ObstoreStore) -> None:
    _run(file_store, "a", [1.0])
    with pytest.raises(NotFound, match="no run 'c'"):
        compare_runs(file_store, ["a", "c"])
    with pytest.raises(SpecError, match="compare 2 to 20 different runs"):
        compare_runs(file_store, ["a", "a"])
    _run(file_store, "b", [1.0])
    answer = CliRunner().invoke(app, ["compare", "a", "b", "--metric", "f1", "--store", file_store.uri])
    assert answer.exit_code == 1
    assert "--metric f1: no run has this curve; curves: loss, lr, validation_accuracy" in answer.output
