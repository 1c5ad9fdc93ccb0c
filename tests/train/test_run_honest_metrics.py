"""A real run with rare positives and few rows in its last step: trained to the end, measured per class, reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from maas_ray.cli.app import app
from maas_ray.errors import NotFound, SpecError
from maas_ray.store.manifest import open_committed
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.report import JSON, KIND, PNG
from maas_ray.train.records.runs import Runs
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster


def _spec(store: ObstoreStore, folder: Path, num_rows: int, workers: int) -> TrainSpec:
    """Frauds are 20 % of the rows; a third of the rows is held out."""
    rng = np.random.default_rng(0)
    is_fraud = np.arange(num_rows) % 5 == 0
    lines = ["amount,weight,kind"]
    for fraud in is_fraud:
        lines.append(f"{rng.normal() + 3 * fraud:.4f},{1 + rng.random():.3f},{'fraud' if fraud else 'legit'}")
    (folder / "rows.csv").write_text("\n".join(lines))
    fields = {
        "run": "fraud",
        "model": {"name": "mlp", "params": {"size": 1, "norm": "batch"}},
        "data": {
            "uri": str(folder / "rows.csv"),
            "target": "kind",
            "task": "binary",
            "positive_class": "fraud",
            "weight": "weight",
            "split": {"stratify": True, "validation": 0.2, "test": 0.2},
        },
        "objective": {"class_weights": "balanced", "threshold": "f1"},
        "optimizer": {"lr": 0.02},
        "epochs": 1,
        "batch": {"global_size": 64},
        "workers": {"count": workers},
        "storage": {"uri": store.uri},
    }
    return TrainSpec.model_validate(fields)


@pytest.mark.fault
def test_rare_positives_are_measured_and_two_rows_of_two_workers_end_no_run(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    spec = _spec(file_store, tmp_path, 110, workers=2)  # 66 for training: the last step has 2
    result = run_training(spec)
    assert (result.step, Runs(file_store).get("fraud").status) == (2, "finished")
    report = open_committed(file_store, "runs/fraud/report", KIND)
    found = json.loads(report.read(JSON))["classes"]
    assert report.read(PNG).startswith(b"\x89PNG")
    assert (found["step"], found["positive_class"]) == (2, "fraud")
    assert {label: scores["support"] for label, scores in found["classes"].items()} == {"legit": 18, "fraud": 4}
    assert found["classes"]["fraud"]["f1"] == pytest.approx(result.metrics["validation_f1"], abs=1e-6)

    answer = CliRunner().invoke(app, ["evaluate", "fraud", "--store", file_store.uri])
    assert answer.exit_code == 0, answer.output
    for text in ("positive class", "fraud (data.positive_class)", "threshold", "precision", "confusion matrix"):
        assert text in answer.output


def test_a_lone_last_row_is_refused_before_the_run_is_recorded(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    spec = _spec(file_store, tmp_path, 109, workers=1)  # 65 for training
    with pytest.raises(SpecError, match=r"the last of 2 steps has 1 row .*set steps: 1 instead of epochs"):
        run_training(spec)
    with pytest.raises(NotFound):
        Runs(file_store).get("fraud")
