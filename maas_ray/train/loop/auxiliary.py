"""Auxiliary losses of a module, such as the balance of a mixture of experts: weighted, added and logged by name.

A module with auxiliary losses returns `(logits, {name: losses [N]})` in training mode and the logits alone in evaluation
mode. Each is a loss of each row, so that its sum over the global batch is the same on every layout; it is divided by the
number of rows, also for token tasks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maas_ray.errors import ModelError


class AuxiliaryLosses:
    """The auxiliary losses of one rank.

    Args:
        weights: weight of each loss by name.
        device: device of this rank.
    """

    def __init__(self, weights: Mapping[str, float], device: torch.device) -> None:
        self._weights = weights
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in weights}
        self._num_rows = 1

    def begin(self, num_rows: int) -> None:
        """Starts a step with this number of rows in the global batch."""
        self._num_rows = num_rows
        for total in self._sums.values():
            total.zero_()

    def split(self, output: Any, num_rows: int) -> tuple[Tensor, Tensor]:
        """Adds the losses of one micro-batch.

        Args:
            output: what the module returned.
            num_rows: real rows of the micro-batch; a row after them is padding.

        Returns:
            The logits; and the weighted sum of the losses, a scalar, in units of the mean over the global batch.

        Raises:
            ModelError: the module did not return these losses.
        """
        logits, losses = split_output(output, self._weights)
        total = logits.new_zeros(())
        for name, weight in self._weights.items():
            value = losses[name][:num_rows].sum()
            self._sums[name] += value.detach()
            total = total + weight * value
            total = total + losses[name][num_rows:].sum() * 0.0
        return logits, total / self._num_rows

    def means(self, num_groups: int) -> dict[str, float]:
        """The mean of each loss over the rows of the global batch, unweighted. Collective.

        Args:
            num_groups: number of ranks that have the same rows.
        """
        sums = torch.stack(list(self._sums.values()))
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = (sums / num_groups / self._num_rows).tolist()
        return dict(zip(self._sums, means, strict=True))


def split_output(output: Any, weights: Mapping[str, float]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Splits what a module returned in training mode into logits and auxiliary losses.

    Args:
        output: logits, or `(logits, {name: losses [N]})`.
        weights: weight of each loss by name.

    Raises:
        ModelError: names, types or shapes differ from the spec.
    """
    if isinstance(output, Tensor) and not weights:
        return output, {}
    is_pair = isinstance(output, tuple | list) and len(output) == 2
    if not is_pair or not isinstance(output[0], Tensor) or not isinstance(output[1], Mapping):
        got = f"a {type(output).__name__}"
        wanted = "(logits, {name: losses [N]})" if weights else "the logits"
        raise ModelError(
            f"the model returns {got} in training mode; with objective.auxiliary "
            f"{', '.join(weights) or 'empty'} it must return {wanted}"
        )
    logits, losses = output
    if losses.keys() != weights.keys():
        raise ModelError(
            f"the model returns the auxiliary losses {', '.join(losses) or 'none'}, but objective.auxiliary has weights of "
            f"{', '.join(weights) or 'none'}; give each loss a weight (0 ignores it)"
        )
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"the auxiliary loss {name} has the shape {shape}; it must have one value for each row, "
                f"{list(logits.shape[:1])}, since workers and micro-batches split the rows of a batch"
            )
    return logits, losses
