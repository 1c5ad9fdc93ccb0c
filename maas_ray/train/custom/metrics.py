"""Metrics that a spec names by import path, and their check before the first step."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from maas_ray.errors import SpecError
from maas_ray.train.custom.imported import construct, import_callable, import_object
from maas_ray.train.spec.metrics import MetricSpec

FIELD = "metrics"


class CustomMetrics:
    """A user's metrics over the rows of one split.

    Args:
        specs: the metrics.
        group: ranks that evaluate different rows; None: only this one.

    Raises:
        SpecError: one cannot be imported or constructed.
    """

    def __init__(self, specs: Sequence[MetricSpec], group: dist.ProcessGroup | None = None) -> None:
        self._specs = {spec.label: spec for spec in specs}
        self._metrics: dict[str, Metric] = {spec.label: _build(spec) for spec in specs}
        for metric in self._metrics.values():
            for inner in metric.modules():
                if isinstance(inner, Metric):
                    inner.process_group = group
                    inner.distributed_available_fn = lambda: group is not None

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Adds rows: predictions [N, …] and their target [N, …]."""
        for label, metric in self._metrics.items():
            with _Named(self._specs[label].name):
                metric.update(predictions, target)

    def begin(self, device: torch.device) -> None:
        """Forgets all rows; the next ones are on this device."""
        for metric in self._metrics.values():
            metric.to(device).reset()

    def compute(self) -> dict[str, float]:
        """The value of each metric over the rows of all ranks of the group. Collective."""
        found = {}
        for label, metric in self._metrics.items():
            with _Named(self._specs[label].name):
                value = metric.compute()
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise SpecError(
                        f"{FIELD}: {self._specs[label].name} returns a tensor {list(value.shape)}; a metric is one number (set "
                        "its average in params)"
                    )
                found[label] = float(value)
        return found

    def refuse_direction(self, metric: str, mode: str, field: str) -> None:
        """Refuses the wrong direction of improvement, where torchmetrics knows the right one.

        Raises:
            SpecError: the mode is wrong.
        """
        larger = getattr(self._metrics[metric], "higher_is_better", None) if metric in self._metrics else None
        if larger is not None and larger != (mode == "max"):
            better = "larger" if larger else "smaller"
            raise SpecError(
                f"{field}.mode: {better} values of {self._specs[metric].name} are better; set mode to "
                f"{'max' if larger else 'min'}, not {mode}"
            )


class _MeanOfRows(MeanMetric):  # type: ignore[misc]
    """The mean of a function's values, each of one row."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], path: str) -> None:
        super().__init__()
        self._function, self._path = function, path

    def update(self, predictions: Tensor, target: Tensor) -> None:
        values = self._function(predictions, target)
        if not isinstance(values, Tensor) or values.shape != target.shape[:1]:
            got = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise SpecError(
                f"{FIELD}: {self._path} returns {got} for a target {list(target.shape)}; a function returns the value of "
                "each row, whose mean is taken over the rows of all batches and ranks; for another metric write a "
                "torchmetrics.Metric"
            )
        super().update(values.to(torch.float32))


class _Named:
    """Converts exceptions of a user's code into a `SpecError` with the path of the metric."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, SpecError):
            raise SpecError(f"{FIELD}: {self._path} failed: {type(error).__name__}: {error}") from error


def build_metrics(specs: Sequence[MetricSpec], group: dist.ProcessGroup | None = None) -> CustomMetrics | None:
    """The metrics of a spec, or None if there are none; for the arguments see `CustomMetrics`."""
    return CustomMetrics(specs, group) if specs else None


def check_metrics(metrics: CustomMetrics, predictions: Tensor, target: Tensor) -> None:
    """Computes a user's metrics of a few rows.

    Raises:
        SpecError: one raises, or returns anything but one number.
    """
    metrics.update(predictions, target)
    metrics.compute()


def _build(spec: MetricSpec) -> Metric:
    field = f"{FIELD}.{spec.label}"
    found = import_object(spec.name, field)
    if inspect.isclass(found) and issubclass(found, nn.Module) and not issubclass(found, Metric):
        raise SpecError(f"{field}: {spec.name} is {found!r}; name a subclass of torchmetrics.Metric or a function")
    if inspect.isclass(found):
        built = construct(found, spec.name, field, **spec.params)  # torchmetrics' classes may build a subclass
        if isinstance(built, Metric):
            return built
    return _MeanOfRows(import_callable(spec.name, spec.params, field, 2), spec.name)
