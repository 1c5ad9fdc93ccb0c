"""The average that an optimizer keeps by itself, such as a schedule-free one (Defazio et al. 2024, arXiv 2405.15682).

Such an optimizer trains other weights than those that are to be evaluated. Its methods `eval` and `train` convert the
weights in place; rounding makes them differ slightly after a round trip, therefore the trained weights are restored
from a copy, and neither a validation nor a checkpoint changes what the next step computes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from maas_ray.train.modules.sharded import local, reshard


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer with other weights in evaluation."""

    def eval(self) -> None:
        """Converts the weights in place to those of evaluation."""

    def train(self) -> None:
        """Converts the weights in place to those of training; a step needs this mode."""


class OptimizerAverage:
    """The weights of evaluation of one rank's parts.

    Args:
        parts: parts of the network.
        optimizer: their optimizer, in training mode.
    """

    def __init__(self, parts: Sequence[nn.Module], optimizer: AveragingOptimizer) -> None:
        self._parts = parts
        self._optimizer = optimizer
        self._weights = {
            name: weight for part in parts for name, weight in part.named_parameters() if weight.requires_grad
        }

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """Copies of the weights of evaluation by the weight's name in the whole model, with the weight's placement."""
        with self.applied():
            return {
                name: weight.detach().clone(memory_format=torch.preserve_format)
                for name, weight in self._weights.items()
            }

    def update(self, step: int) -> None:
        """Does nothing: the optimizer's step has updated the average."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the network use the average inside the block; afterwards its weights are restored exactly."""
        reshard(self._parts)
        kept = {name: local(weight.detach()).clone() for name, weight in self._weights.items()}
        self._optimizer.eval()
        try:
            yield
        finally:
            reshard(self._parts)
            self._optimizer.train()
            with torch.no_grad():
                for name, weight in self._weights.items():
                    local(weight).copy_(kept[name])
