"""Converts numeric targets between the units of the data and those in which the network learns.

Rows are scaled once, where they are loaded, so that losses and networks never see the units of the data. Evaluation and
the exported graph convert predictions back.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maas_ray.data.spec.features import TargetScaling


def scaled_target(scaling: TargetScaling | None, target: NDArray[Any]) -> NDArray[Any]:
    """The target of rows [N] as the network learns it: float32, or unchanged without scaling."""
    if scaling is None:
        return target
    shift, scale = (np.asarray(values[0], np.float64) for values in (scaling.shift, scaling.scale))
    scaled: NDArray[Any] = ((target.astype(np.float64) - shift) / scale).astype(np.float32)
    return scaled


class TargetUnits(nn.Module):
    """Converts outputs [N, K] of a network, or targets [N], to the units of the data.

    Args:
        scaling: the scale in which the network learns; None: outputs are in the units of the data.
        dtype: type of the constants, and of the result.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, scaling: TargetScaling | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._is_scaled = scaling is not None
        shift, scale = (scaling.shift, scaling.scale) if scaling is not None else ((0.0,), (1.0,))
        self.register_buffer("shift", torch.tensor(shift, dtype=dtype), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """`values * scale + shift`."""
        return values.to(self.scale.dtype) * self.scale + self.shift if self._is_scaled else values
