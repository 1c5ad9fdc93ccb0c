"""The names of a run's metrics and the direction of improvement. Independent of torch and of their computation.

`loss` is the training loss of a logged step; `validation_loss`, `validation_accuracy`, … are of the validation split.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from maas_ray.errors import SpecError
from maas_ray.spec import Spec
from maas_ray.train.spec.names import check_name

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "loss"),
    "binary": ("accuracy", "auroc", "f1", "loss"),
    "regression": ("loss", "mae", "mse", "r2"),
    "language_modeling": ("accuracy", "loss", "perplexity"),
    "masked_language_modeling": ("accuracy", "loss", "perplexity"),
}
"""Metrics of an evaluation for each task; see evaluate.py."""
LARGER_IS_BETTER = ("accuracy", "auroc", "f1", "r2")
VALIDATION = "validation_"


class MetricSpec(Spec):
    """A user's own metric, in addition to those of the task."""

    name: str = Field(max_length=200)
    """Import path `package.module:name` of a torchmetrics.Metric, such as
    `torchmetrics.classification:MulticlassMatthewsCorrCoef`, or of a function (predictions, target, **params) -> one value
    for each row, whose mean is the metric. Predictions are the logits [N, K] and the target is the class; for `binary`
    probabilities [N], for `regression` values [N], for tokens the logits [M, V] of the M counted tokens."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the constructor, or further arguments of the function."""
    key: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]{0,49}$")
    """Name of its values in logs and in `checkpoint.metric` (with `validation_` before it); None: the name of the class
    or function in snake case."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_name("metric", self.name, [])
        return self

    @property
    def label(self) -> str:
        """The name of its values."""
        name = self.name.partition(":")[2]
        return self.key or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")


def refuse_labels(metrics: Sequence[MetricSpec], task: str) -> None:
    """Refuses two metrics of the same name. Raises `ValueError`."""
    seen = set(METRICS[task])
    for metric in metrics:
        if metric.label in seen:
            raise ValueError(
                f"metrics: {metric.label!r} is the name of two metrics of this {task} run; give {metric.name} another `key`"
            )
        seen.add(metric.label)


def refuse_metric(
    field: str, metric: str, mode: str, task: str, has_validation: bool, own: Collection[str] = ()
) -> None:
    """Refuses a metric that the run does not have, or the wrong direction of improvement.

    Args:
        field: name of the spec's field, for the message.
        metric: `loss` or `validation_…`.
        mode: `min` or `max`.
        task: task of the data.
        has_validation: whether the data has a validation split.
        own: names of the user's own metrics, of which either direction is accepted.

    Raises:
        SpecError: the message lists the available metrics.
    """
    there = ["loss", *(f"{VALIDATION}{name}" for name in (*METRICS[task], *own) if has_validation)]
    if metric not in there:
        why = "" if has_validation else "; the data has no validation split, see data.split"
        raise SpecError(f"{field}.metric: a {task} run has no metric {metric!r}; metrics: {', '.join(there)}{why}")
    if metric.removeprefix(VALIDATION) in own:
        return
    if (wanted := "max" if metric.removeprefix(VALIDATION) in LARGER_IS_BETTER else "min") != mode:
        better = "larger" if wanted == "max" else "smaller"
        raise SpecError(f"{field}.mode: {better} values of {metric} are better; set mode to {wanted}, not {mode}")


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Drops metrics that JSON cannot represent (the AUROC of one class, the perplexity of a loss of 1000)."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def remark(metrics: Mapping[str, float]) -> str | None:
    """What a reader of metrics should know about them, or None."""
    worse = [name for name, value in metrics.items() if name.removeprefix(VALIDATION) == "r2" and value < 0]
    return f"{worse[0]} is below 0: worse than predicting the mean of the target" if worse else None


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one entry of a history: `{step, loss, …}` or `{step, validation: {…}}`."""
    metrics = {"loss": entry["loss"]} if "loss" in entry else {}
    return metrics | {f"{VALIDATION}{name}": value for name, value in entry.get("validation", {}).items()}


def newest_metrics(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The newest metric of each name in a history, oldest first."""
    newest: dict[str, float] = {}
    for entry in history:
        newest.update(metrics_of(entry))
    return newest


def metrics_at(history: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Metrics of the state after `step`: its validation metrics and the newest loss."""
    metrics: dict[str, float] = {}
    for entry in history:
        metrics.update(
            {name: value for name, value in metrics_of(entry).items() if name == "loss" or entry["step"] == step}
        )
    return metrics


def best_step(metrics: Mapping[int, Mapping[str, float]], metric: str, mode: str) -> int | None:
    """The step with the best metric, or the newest of equal ones; None if no step has the metric.

    Args:
        metrics: metrics by step, each by name.
        metric: name of the compared metric.
        mode: `min` or `max`.
    """
    scored = [(found[metric], step) for step, found in metrics.items() if metric in found]
    sign = 1 if mode == "min" else -1
    return min(((sign * score, -step, step) for score, step in scored), default=(0.0, 0, None))[2]
