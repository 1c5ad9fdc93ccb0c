"""Activations and normalizations by name. Knows no model."""

from collections.abc import Callable
from typing import Literal

from torch import nn

Activation = Literal["relu", "gelu", "tanh", "silu", "leaky_relu", "elu"]

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}

MAX_GROUPS = 8


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Group normalization with the largest number of groups up to `MAX_GROUPS` that divides the channels."""
    groups = next(count for count in range(MAX_GROUPS, 0, -1) if num_channels % count == 0)
    return nn.GroupNorm(groups, num_channels)
