"""The weight of each row in the training loss: that of the data set times that of its class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maas_ray.data.loading.rows import Batch


class RowWeights:
    """Computes the weights of a batch's rows.

    Args:
        of_class: weight of each class; None: classes have no weights.
        device: device of the results.
    """

    def __init__(self, of_class: Sequence[float] | None, device: torch.device) -> None:
        self._of_class = None if of_class is None else torch.tensor(of_class, dtype=torch.float64, device=device)
        self._device = device

    def __call__(self, batch: Batch) -> Tensor:
        """The weights, float64 [B]."""
        target = batch.target.to(self._device, non_blocking=True)
        if self._of_class is None:
            weights = torch.ones(len(target), dtype=torch.float64, device=self._device)
        else:
            weights = self._of_class[target.long()]
        if batch.weight is not None:
            weights = weights * batch.weight.to(self._device, torch.float64, non_blocking=True)
        return weights
