"""Asynchronous validation on a real cluster: the same metrics, each at its own step, whatever is interrupted."""

import time
from pathlib import Path
from typing import Any

import pytest

from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, read_saved
from maas_ray.checkpoint.index import read_index, tensors_digest
from maas_ray.checkpoint.load import read_tensors
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import ResourcesMissing, SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.checkpoint_selector import choose_step
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.async_validation import AsyncValidator
from maas_ray.train.validation.load_model import evaluate_trained, load_trained
from tests.conftest import RayCluster
from tests.support.small_runs import make_run

CHANGES: dict[str, Any] = {
    "steps": 24,
    "log_every": 1,
    "ema": {"decay": 0.8},
    "validation": {"mode": "async"},
    "checkpoint": {"every_steps": 4, "keep_last": 2, "keep_best": 1},
    "tensorboard": {"samples": 2, "histograms_every": 4},
}


def _spec(store: ObstoreStore, tmp_path: Path, **changes: Any) -> TrainSpec:
    return make_run(store, tmp_path, "mlp", **{**CHANGES, **changes})[0]


def _create(store: ObstoreStore, tmp_path: Path, **changes: Any) -> TrainSpec:
    """A run of a prepared table, which a driver then resumes: `rows.csv` is nowhere."""
    spec, dataset = make_run(store, tmp_path, "mlp", **{**CHANGES, **changes})
    Runs(store).create(spec, dataset.digest, None)
    return spec


def _validated(store: ObstoreStore, run: str) -> dict[int, float]:
    history = read_saved(open_checkpoint(store, checkpoints_prefix(run))).history
    found = {entry["step"]: entry["validation"]["loss"] for entry in history if "validation" in entry}
    return found | {step: metrics["validation_loss"] for step, metrics in Runs(store).validated(run).items()}


@pytest.mark.fault
def test_async_validation_changes_neither_the_run_nor_the_metrics(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    spec = _create(file_store, tmp_path, run="async")
    result = run_training(spec, resume=True)
    between = _create(file_store, tmp_path, run="sync", validation={}, validate_every=4)
    run_training(between, resume=True)
    digests = {
        tensors_digest(read_index(open_checkpoint(file_store, checkpoints_prefix(run)))) for run in ("async", "sync")
    }
    assert len(digests) == 1
    found, expected = _validated(file_store, "async"), _validated(file_store, "sync")
    assert list(found) == list(expected) == [4, 8, 12, 16, 20, 24]
    assert found == pytest.approx(expected, rel=1e-5)
    assert result.metrics["validation_loss"] == found[24]
    best = min(found, key=lambda step: (found[step], -step))
    runs = Runs(file_store)
    for run in ("async", "sync"):
        assert best in list_checkpoints(file_store, checkpoints_prefix(run)), "the best one is kept"
        assert choose_step(file_store, runs.get(run), "best") == best
        assert choose_step(file_store, runs.get(run), None) == 24


@pytest.mark.fault
def test_early_stopping_decides_the_same_with_async_validation_and_after_an_interruption(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    # Nothing is better by so much: the metrics of steps 4, 8 and 12 end the run when those of 12 are due, at step 16.
    early = {"patience": 2, "min_delta": 1e6}
    keeps = {**CHANGES["checkpoint"], "keep_last": 9}
    spec = _create(file_store, tmp_path, run="whole", early_stopping=early, checkpoint=keeps)
    result = run_training(spec, resume=True)
    assert result.step == 16
    assert result.reason is not None
    assert result.reason.endswith("2 consecutive values up to step 12")

    # Another run, as if it had been killed after step 8: the metrics of that step are still due.
    parts = _create(file_store, tmp_path, run="parts", early_stopping=early)
    committed = open_checkpoint(file_store, checkpoints_prefix("whole"), 8)
    saved = read_saved(committed)
    assert {entry["step"] for entry in saved.history if "validation" in entry} == {4}
    state = Snapshot(8, saved.cursor, read_tensors(committed, ""), saved.meta, saved.history)
    save(file_store, checkpoints_prefix("parts"), state)
    resumed = run_training(parts, resume=True)
    assert (resumed.step, resumed.reason) == (16, result.reason)
    assert _validated(file_store, "parts") == pytest.approx(_validated(file_store, "whole"), rel=1e-5)


@pytest.mark.fault
def test_a_task_gives_the_metrics_of_its_checkpoint_and_leaves_them_in_the_log(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    spec = _create(file_store, tmp_path)
    run_training(
        spec.model_copy(update={"validation": spec.validation.model_copy(update={"mode": "sync"})}), resume=True
    )
    validator = AsyncValidator(file_store, spec)
    validator.resume([{"step": 24, "validation": {}}], [20, 24])
    assert validator.is_ready(0.0), "nothing is missing"
    validator.resume([], [20, 24])
    deadline = time.monotonic() + 120
    while not validator.is_ready(1.0):
        assert time.monotonic() < deadline
    taken = validator.take()
    assert taken is not None
    step, metrics, samples = taken
    assert (step, validator.take()) == (24, None)
    assert metrics == evaluate_trained(load_trained(file_store, spec.run, 24), "validation").metrics
    assert samples.count("\n") == 3
    assert Runs(file_store).validated(spec.run) == {
        24: {f"validation_{name}": value for name, value in metrics.items()}
    }
    assert Runs(file_store).get(spec.run).status == "finished"

    again = AsyncValidator(file_store, spec)
    again.start(24)
    assert again.is_ready(0.0), "what is in the log is not computed again"
    again.start(7)  # not a checkpoint
    while not again.is_ready(1.0):
        assert time.monotonic() < deadline
    assert again.take() is None, "training continues without the missing metrics"
    assert "7" in Runs(file_store).get(spec.run).unvalidated[7]
    late = AsyncValidator(
        file_store, spec.model_copy(update={"validation": spec.validation.model_copy(update={"timeout_s": 1e-9})})
    )
    late.start(20)
    assert late.is_ready(0.0)
    assert late.take() is None
    assert "validation.timeout_s" in Runs(file_store).get(spec.run).unvalidated[20]
    assert Runs(file_store).get(spec.run).status == "finished"
    late.close()


def test_what_would_never_come_is_refused(file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove validate_every"):
        _spec(file_store, tmp_path, validate_every=3)
    with pytest.raises(ResourcesMissing, match="has 8 CPU, but 2 workers of 3 and the validation task of 4 need 10"):
        run_training(
            _spec(file_store, tmp_path, workers={"count": 2, "cpus": 3}, validation={"mode": "async", "cpus": 4})
        )
    digits = {"uri": "sklearn:digits", "task": "classification", "split": {"validation": 0, "test": 0.1}}
    with pytest.raises(SpecError, match="needs a validation split"):
        run_training(_spec(file_store, tmp_path, data=digits, checkpoint={}))
    assert Runs(file_store).all() == []
