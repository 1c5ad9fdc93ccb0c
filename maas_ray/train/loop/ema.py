"""The exponential moving average of a TrainState's weights (Polyak & Juditsky 1992), on any layout. Knows no loop.

Averages lie as the weights do: whole, or this rank's piece of a DTensor, so updating them needs no other rank. Buffers,
such as the statistics of a batch normalization, are not averaged: those of the weights are used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maas_ray.train.loop.gradients import local


class Ema:
    """The averages of one rank's parts.

    Args:
        parts: pieces of the network, with their initial weights.
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
        """By the weight's name in the whole model: tensors, or DTensors that lie as the weight does."""

    def update(self, step: int) -> None:
        """Takes the weights after `step` steps in."""
        averages = [local(average) for average in self.averages.values()]
        weights = [local(weight.detach()) for weight in self._weights.values()]
        if step <= self._start_step:
            torch._foreach_copy_(averages, weights)
        elif averages:
            self._average(averages, weights, step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network computes with the averages; afterwards with its weights, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # FSDP2 may have kept whole weights of the last forward pass, which would be used instead.
        for part in self._parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        with torch.no_grad():
            for name, weight in self._weights.items():
                mine, average = local(weight), local(self.averages[name])
                kept = mine.clone()
                mine.copy_(average)
                average.copy_(kept)
