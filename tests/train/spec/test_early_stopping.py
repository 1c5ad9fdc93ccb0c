"""When a run ends early, and that it does so at the same step however often it is interrupted."""

from typing import Any

import pytest

from maas_ray.errors import SpecError
from maas_ray.train.spec.early_stopping import Stopper
from maas_ray.train.spec.metrics import LARGER_IS_BETTER, METRICS, best_step, finite, metrics_at, refuse_metric
from maas_ray.train.spec.train import TrainSpec


def _history(*losses: float) -> list[dict[str, Any]]:
    return [
        entry
        for step, loss in enumerate(losses, start=1)
        for entry in ({"step": step, "loss": -loss, "lr": 0.1}, {"step": step, "validation": {"loss": loss}})
    ]


def _stopped_at(history: list[dict[str, Any]], stopper: Stopper) -> int | None:
    """The number of entries after which the run ends."""
    return next((n for n in range(len(history) + 1) if stopper.follow(history[:n]) is not None), None)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "mode", "stops_after"),
    [
        ((3, 2, 1, 0.5), 1, 0.0, "min", None),
        ((3, 2, 2, 1), 1, 0.0, "min", 3),  # equal is not better
        ((3, 2, 2, 1), 2, 0.0, "min", None),
        ((3, 2, 4, 5, 1), 2, 0.0, "min", 4),
        ((3, 2.95, 2.91, 2.85), 2, 0.1, "min", 3),  # each better than the last, none by more than the threshold
        ((3, 2.95, 2.8, 2.75), 2, 0.1, "min", None),
        ((1, 2, 3, 2.5, 2.9), 2, 0.0, "max", 5),
    ],
)
def test_a_run_ends_when_its_metric_was_not_better_so_often(
    losses: tuple[float, ...], patience: int, min_delta: float, mode: str, stops_after: int | None
) -> None:
    history = _history(*losses)
    found = _stopped_at(history, Stopper("validation_loss", mode, patience, min_delta))
    assert found == (2 * stops_after if stops_after else None)
    for interrupted in range(len(history)):
        resumed = Stopper("validation_loss", mode, patience, min_delta)
        ends = (n for n in range(interrupted, len(history) + 1) if resumed.follow(history[:n]) is not None)
        assert next(ends, None) == (None if found is None else max(found, interrupted))


def test_the_reason_contains_metric_and_steps() -> None:
    stopper = Stopper("validation_loss", "min", 2, 0.0)
    reason = stopper.follow(_history(3, 2, 4, 5))
    assert reason == (
        "early stopping: validation_loss has not improved on 2 (step 2) in 2 consecutive values up to step 4"
    )
    assert stopper.follow(_history(3, 2, 4, 5, 0)) == reason, "the decision does not change"


@pytest.mark.parametrize(
    ("metric", "mode", "task", "has_validation", "message"),
    [
        ("validation_acuracy", "max", "classification", True, "no metric 'validation_acuracy'; metrics: loss, validation_accuracy"),
        ("validation_loss", "min", "binary", False, "metrics: loss; the data has no validation split"),
        ("validation_auroc", "max", "classification", True, "validation_f1"),
        ("validation_accuracy", "min", "binary", True, "set mode to max"),
        ("loss", "max", "regression", True, "set mode to min"),
    ],
)  # fmt: skip
def test_a_metric_that_is_never_reported_is_refused(
    metric: str, mode: str, task: str, has_validation: bool, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        refuse_metric("early_stopping", metric, mode, task, has_validation)
    for name in METRICS[task]:
        refuse_metric("checkpoint", f"validation_{name}", "max" if name in LARGER_IS_BETTER else "min", task, True)


def test_a_checkpoint_has_only_the_validation_metrics_of_its_own_step() -> None:
    history = [*_history(3, 2), {"step": 3, "loss": 0.5, "lr": 0.1}]
    assert metrics_at(history, 2) == {"loss": 0.5, "validation_loss": 2}
    assert metrics_at(history, 3) == {"loss": 0.5}, "an older metric would make it look like a best one"
    metrics = {1: {"a": 2.0}, 2: {"a": 1.0}, 3: {"a": 1.0}, 4: {"b": 0.0}}
    assert (best_step(metrics, "a", "min"), best_step(metrics, "a", "max"), best_step(metrics, "c", "min")) == (
        3,
        1,
        None,
    )
    assert finite({"auroc": float("nan"), "perplexity": float("inf"), "loss": 1.0}) == {"loss": 1.0}


def test_the_direction_of_a_metric_is_known_and_can_be_set() -> None:
    fields: dict[str, Any] = {
        "run": "r",
        "model": {"name": "mlp"},
        "data": {"uri": "sklearn:digits", "task": "classification"},
        "checkpoint": {"metric": "validation_f1", "mode": "max", "keep_best": 1},
    }
    assert TrainSpec.model_validate(fields).stopper() is None
    spec = TrainSpec.model_validate({**fields, "early_stopping": {"patience": 1}})
    stopper = spec.stopper()
    assert stopper is not None
    assert stopper.follow([{"step": step, "validation": {"f1": 1.0}} for step in (1, 2)]) is not None
    assert spec.same_training(TrainSpec.model_validate(fields)) == [], "it may be resumed with more patience"
    assert spec.same_training(TrainSpec.model_validate({**fields, "ema": {}})) == ["ema"]
    with pytest.raises(ValueError, match="use: best needs keep_best"):
        TrainSpec.model_validate({**fields, "checkpoint": {"use": "best"}})
