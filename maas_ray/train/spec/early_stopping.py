"""Early stopping: ends a run whose metric no longer improves. A function of the history, independent of the loop.

Every checkpoint contains the history, so that a resumed run stops at the same step as an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from maas_ray.spec import Spec
from maas_ray.train.spec.metrics import VALIDATION, metrics_of


class EarlyStoppingSpec(Spec):
    """Condition for the end of a run before its last step."""

    metric: str | None = None
    """`loss`, or a metric of the validation split, such as `validation_accuracy`; None: `checkpoint.metric`."""
    mode: Literal["min", "max"] | None = None
    """Whether a smaller or a larger metric is better; None: `checkpoint.mode`."""
    patience: PositiveInt = 5
    """Consecutive values without an improvement after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0.0)
    """An improvement must be larger than this."""


class Stopper:
    """Decides from a history whether a run ends.

    Args:
        metric: name of the metric.
        mode: `min` or `max`.
        patience: see `EarlyStoppingSpec`.
        min_delta: see `EarlyStoppingSpec`.
    """

    def __init__(self, metric: str, mode: str, patience: int, min_delta: float) -> None:
        self._metric, self._patience, self._min_delta = metric, patience, min_delta
        self._sign = 1.0 if mode == "min" else -1.0
        self._seen = 0
        self._best: tuple[float, int] | None = None
        self._num_worse = 0
        self.reason: str | None = None
        """Reason for the end of the run; None: it continues."""
        self.needs_validation = metric.startswith(VALIDATION)
        """Whether the metric is a validation metric."""

    def follow(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Reads the entries since the last call; returns `reason`, which does not change once set."""
        for entry in history[self._seen :]:
            if self.reason is None and (value := metrics_of(entry).get(self._metric)) is not None:
                self._judge(entry["step"], value)
        self._seen = len(history)
        return self.reason

    def _judge(self, step: int, value: float) -> None:
        if self._best is None or self._sign * (self._best[0] - value) > self._min_delta:
            self._best, self._num_worse = (value, step), 0
            return
        self._num_worse += 1
        if self._num_worse >= self._patience:
            best, at = self._best
            self.reason = (
                f"early stopping: {self._metric} has not improved on {best:.6g} (step {at}) in {self._num_worse} "
                f"consecutive values up to step {step}"
            )
