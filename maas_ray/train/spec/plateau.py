"""Lowers the learning rate on a plateau. A function of the history, independent of the loop.

Every checkpoint contains the history, so that a resumed run has the learning rates of an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maas_ray.train.spec.metrics import metrics_of


class Plateau:
    """Computes the scale of the learning rate from a history; the rule of torch's ReduceLROnPlateau.

    Args:
        metric: name of a validation metric.
        mode: `min` or `max`.
        factor: factor of the scale at each reduction.
        patience: consecutive values without an improvement before a reduction.
        min_delta: smallest improvement that counts.
        lowest: smallest scale.
    """

    def __init__(
        self, metric: str, mode: str, *, factor: float, patience: int, min_delta: float = 0.0, lowest: float = 0.0
    ) -> None:
        self._metric, self._sign = metric, 1.0 if mode == "min" else -1.0
        self._factor, self._patience, self._min_delta, self._lowest = factor, patience, min_delta, lowest
        self._seen = 0
        self._best: float | None = None
        self._num_worse = 0
        self._scale = 1.0

    def follow(self, history: Sequence[Mapping[str, Any]]) -> float:
        """Reads the entries since the last call; returns the scale."""
        for entry in history[self._seen :]:
            if (value := metrics_of(entry).get(self._metric)) is not None:
                self._judge(value)
        self._seen = len(history)
        return self._scale

    def _judge(self, value: float) -> None:
        if self._best is None or self._sign * (self._best - value) > self._min_delta:
            self._best, self._num_worse = value, 0
            return
        self._num_worse += 1
        if self._num_worse >= self._patience:
            self._num_worse = 0
            self._scale = max(self._lowest, self._scale * self._factor)
