"""Runs on Ray Train: what is refused before a worker starts, what ends a run, what is left behind."""

from typing import Any

import pytest
import requests
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
from maas_ray.train.checkpoint import list_checkpoints, load_checkpoint
from maas_ray.train.run import run_training
from maas_ray.train.runs import Runs
from maas_ray.train.spec import TrainSpec
from maas_ray.train.trained import evaluate_run
from tests.conftest import RayCluster
from tests.support.paths import digits_spec


def _spec(store: ObstoreStore, **changes: Any) -> TrainSpec:
    return digits_spec(StorageSpec(uri=store.uri), "r", **changes)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"workers": {"count": 9}}, ResourcesMissing, "9 workers of 1 CPU each"),
        ({"workers": {"count": 1, "gpus": 1}}, ResourcesMissing, "1 GPU"),
        ({"model": {"name": "nowhere.at_all:Net"}}, ModelError, "nowhere.at_all"),
        ({"model": {"name": "tests.support.nets:Missing"}}, ModelError, "Missing"),
        ({"model": {"name": "mlp", "params": {"sise": 3}}}, SpecError, "did you mean 'size'"),
        ({"data": {"uri": "sklearn:digit", "task": "classification"}}, DataError, "digit"),
        ({"schedule": {"name": "cosine", "warmup_steps": 10_000}}, SpecError, "warmup_steps is 10000"),
        ({"objective": {"loss": "mse"}}, SpecError, "the task is classification"),
        ({"batch": {"global_size": 1}}, SpecError, "smaller than workers.count"),
        ({"epochs": 1, "steps": 1}, SpecError, "either epochs or steps"),
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
    with pytest.raises(NotFound, match="no run 'r' in .*; there is: none"):
        run_training(_spec(file_store), resume=True)
    with pytest.raises(NotFound, match="no run 'r'"):
        evaluate_run(file_store, "r")


def test_a_run_is_resumed_only_as_the_same_training_and_shown_in_the_dashboard(
    file_store: ObstoreStore, ray_cluster: RayCluster
) -> None:
    short = {"epochs": None, "steps": 4, "checkpoint": {"every_steps": 2, "keep_last": 1}, "log_every": 2}
    spec = _spec(file_store, model={"name": "tests.support.nets:Flat"}, **short)
    result = run_training(spec)
    assert result.metrics.keys() >= {"loss"}
    assert list_checkpoints(file_store, "r") == [4]
    assert [entry["step"] for entry in load_checkpoint(file_store, "r").history if "loss" in entry] == [2, 4]
    assert Runs(file_store).get("r").status == "finished"
    events = EventAccumulator(result.tensorboard).Reload()
    assert {"train/loss", "train/lr", "train/samples_per_s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]

    with pytest.raises(Conflict, match="give --resume to continue it"):
        run_training(spec)
    with pytest.raises(SpecError, match="other values of optimizer, seed;"):
        run_training(
            _spec(file_store, **{**short, "seed": 7, "optimizer": {"lr": 1}, "model": spec.model}), resume=True
        )
    again = run_training(spec.model_copy(update={"log_every": 1}), resume=True)
    assert again == result, "a finished run is left alone"

    with pytest.raises(DataError, match="has no 'nowhere' split"):
        evaluate_run(file_store, "r", split="nowhere")
    with pytest.raises(NotFound, match="of step 2; there is: 4"):
        evaluate_run(file_store, "r", step=2)

    headers = {"Authorization": f"Bearer {ray_cluster.token}"}
    shown = requests.get(f"{ray_cluster.dashboard_url}/api/train/v2/runs/v1", headers=headers, timeout=30).json()
    runs = [run for run in shown["train_runs"] if run["name"].startswith("r-")]
    assert "FINISHED" in {run["status"] for run in runs}


@pytest.mark.parametrize(
    ("model", "message", "restarts"),
    [
        ("TurnsToNan", "the loss of step 1 is nan", 3),
        pytest.param("Raises", "the module's own mistake", 0, marks=pytest.mark.fault),
    ],
)
def test_an_error_in_training_ends_the_run_with_its_reason(
    file_store: ObstoreStore, ray_cluster: RayCluster, model: str, message: str, restarts: int
) -> None:
    workers = {"count": 1, "max_restarts": restarts}
    spec = _spec(
        file_store, model={"name": f"tests.support.nets:{model}"}, workers=workers, steps=2, epochs=None, log_every=1
    )
    with pytest.raises(TrainingFailed, match=message):
        run_training(spec)
    run = Runs(file_store).get("r")
    assert run.status == "failed"
    assert message in (run.error or "")
    assert list_checkpoints(file_store, "r") == []
