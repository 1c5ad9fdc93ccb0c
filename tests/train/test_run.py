"""Runs on Ray Train: what is refused before a worker starts, what ends a run, what is left behind."""

from pathlib import Path
from typing import Any

import pytest
import requests

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.errors import (
    Conflict,
    DataError,
    MaasError,
    ModelError,
    NotFound,
    ResourcesMissing,
    SpecError,
    StoreDenied,
    TrainingFailed,
)
from maas_ray.store.objects import ObstoreStore, StorageSpec
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.evaluate_run import evaluate_run
from tests.conftest import RayCluster
from tests.support.following import events
from tests.support.paths import STEPS, FinishedRun, digits_spec, table_spec


def _spec(store: ObstoreStore, **changes: Any) -> TrainSpec:
    return digits_spec(StorageSpec(uri=store.uri), "r", **changes)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"workers": {"count": 9}}, ResourcesMissing, "9 workers of 1 CPU each"),
        ({"workers": {"count": 1, "gpus": 1}}, ResourcesMissing, "1 GPU"),
        ({"model": {"name": "nowhere.at_all:Net"}}, ModelError, "nowhere.at_all"),
        ({"model": {"name": "mlp", "params": {"sise": 3}}}, SpecError, "did you mean 'size'"),
        ({"data": {"uri": "sklearn:digit", "task": "classification"}}, DataError, "digit"),
        ({"schedule": {"name": "cosine", "warmup_steps": 10_000}}, SpecError, "warmup_steps is 10000"),
        ({"objective": {"loss": "mse"}}, SpecError, "the task is classification"),
        ({"batch": {"global_size": 1}}, SpecError, "smaller than the 2 data-parallel ranks"),
        ({"epochs": 1, "steps": 1}, SpecError, "either epochs or steps"),
        ({"callbacks": [{"path": "tests.support.following:Nobody"}]}, SpecError, "has no attribute 'Nobody'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_run_is_refused_at_once_and_no_run_is_left(
    file_store: ObstoreStore, ray_cluster: RayCluster, changes: dict[str, Any], kind: type[MaasError], message: str
) -> None:
    with pytest.raises((kind, ValueError)) as caught:
        run_training(_spec(file_store, **changes))
    assert message in str(caught.value)
    assert Runs(file_store).all() == []


def test_a_store_that_cannot_be_written_is_named(ray_cluster: RayCluster) -> None:
    with pytest.raises(StoreDenied, match="/proc/nowhere"):
        run_training(digits_spec(StorageSpec(uri="file:///proc/nowhere"), "r"))


def test_only_what_exists_can_be_resumed_or_evaluated(file_store: ObstoreStore, ray_cluster: RayCluster) -> None:
    with pytest.raises(NotFound, match="no run 'r' in .*; there are no runs yet"):
        run_training(_spec(file_store), resume=True)
    with pytest.raises(NotFound, match="no run 'r'"):
        evaluate_run(file_store, "r")


def test_a_run_is_resumed_only_as_the_same_training_and_shown_in_the_dashboard(
    finished_run: FinishedRun, ray_cluster: RayCluster
) -> None:
    spec, store, result = finished_run.spec, finished_run.store, finished_run.result
    assert result.metrics.keys() >= {"loss"}
    assert list_checkpoints(store, checkpoints_prefix("table")) == [80, 160, STEPS]
    assert Runs(store).get("table").status == "finished"

    with pytest.raises(Conflict, match="continue it with --resume"):
        run_training(spec)
    with pytest.raises(SpecError, match="other values of optimizer, seed,"):
        changes = {"seed": 7, "optimizer": {"lr": 1}}
        run_training(table_spec(spec.storage, "table", finished_run.table, **changes), resume=True)
    again = run_training(spec.model_copy(update={"log_every": 2}), resume=True)
    assert again == result, "a finished run is left alone"

    with pytest.raises(DataError, match="has no 'nowhere' split"):
        evaluate_run(store, "table", split="nowhere")
    with pytest.raises(NotFound, match="of step 2; steps: 80, 160, 240"):
        evaluate_run(store, "table", step=2)

    headers = {"Authorization": f"Bearer {ray_cluster.token}"}
    shown = requests.get(f"{ray_cluster.dashboard_url}/api/train/v2/runs/v1", headers=headers, timeout=30).json()
    runs = [run for run in shown["train_runs"] if run["name"].startswith("table-")]
    assert "FINISHED" in {run["status"] for run in runs}


@pytest.mark.parametrize(
    ("model", "message", "restarts"),
    [
        ("TurnsToNan", "the loss of step 1 is nan", 0),
        # An error of ours is not worth a restart: it ends the run though three are left.
        pytest.param("TurnsToNan", "the loss of step 1 is nan", 3, marks=pytest.mark.fault),
        pytest.param("Raises", "the module's own mistake", 0, marks=pytest.mark.fault),
        pytest.param("Raises", "failed twice before its first step with the same error", 3, marks=pytest.mark.fault),
    ],
)
def test_an_error_in_training_ends_the_run_with_its_reason(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path, model: str, message: str, restarts: int
) -> None:
    followed = {"path": "tests.support.following:Notes", "params": {"file": str(tmp_path / "notes")}}
    spec = _spec(
        file_store,
        model={"name": f"tests.support.nets:{model}"},
        workers={"count": 1, "max_restarts": restarts},
        steps=2,
        epochs=None,
        log_every=1,
        callbacks=[followed],
    )
    with pytest.raises(TrainingFailed, match=message):
        run_training(spec)
    run = Runs(file_store).get("r")
    assert run.status == "failed"
    assert message in (run.error or "")
    assert list_checkpoints(file_store, checkpoints_prefix("r")) == []
    attempts = 2 if "twice" in message else 1
    assert [(one["event"], one.get("reason")) for one in events(tmp_path / "notes")] == attempts * [
        ("begin", None),
        ("end", "failed"),
    ]


def test_a_callback_follows_a_run_from_its_first_step_to_its_end(finished_run: FinishedRun) -> None:
    found = events(finished_run.notes)
    assert (found[0], found[-1]) == (
        {"event": "begin", "run": "table", "first_step": 0, "logged": 0},
        {"event": "end", "reason": "finished"},
    )
    assert [one["step"] for one in found if one["event"] == "checkpoint"] == [80, 160, STEPS]
    assert [one["step"] for one in found if one["event"] == "step"] == [*range(1, STEPS + 1)]
