"""The exponential moving average of a TrainState's weights (Polyak & Juditsky 1992), on any layout.

Averages have the placement of the weights: whole, or this rank's part of a DTensor, so that updates need no other
rank. Buffers, such as the statistics of a batch normalization, are not averaged: the current ones are used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maas_ray.train.modules.sharded import local, reshard


class Ema:
    """The averages of one rank's parts.

    Args:
        parts: parts of the network, with their initial weights.
        decay: see `EmaSpec`.
        start_step: see `EmaSpec`.
    """

    def __init__(self, parts: Sequence[nn.Module], decay: float, start_step: int) -> None:
        self._parts = parts
        self._start_step = start_step
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._weights = {
            name: weight for part in parts for name, weight in part.named_parameters() if weight.requires_grad
        }
        self.averages: Mapping[str, Tensor] = {
            name: weight.detach().clone(memory_format=torch.preserve_format) for name, weight in self._weights.items()
        }
        """Averages by the weight's name in the whole model: tensors, or DTensors with the placement of the weight."""

    def update(self, step: int) -> None:
        """Updates the averages with the weights after `step` steps."""
        averages = [local(average) for average in self.averages.values()]
        weights = [local(weight.detach()) for weight in self._weights.values()]
        if step <= self._start_step:
            torch._foreach_copy_(averages, weights)
        elif averages:
            self._average(averages, weights, step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the network use the averages inside the block; afterwards its weights are restored exactly."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        reshard(self._parts)
        with torch.no_grad():
            for name, weight in self._weights.items():
                mine, average = local(weight), local(self.averages[name])
                kept = mine.clone()
                mine.copy_(average)
                average.copy_(kept)
