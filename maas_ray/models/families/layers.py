"""Activations and normalizations by name. Independent of model families."""

from collections.abc import Callable

from torch import nn

from maas_ray.models.params import Activation, Norm2d

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


NORMS_2D: dict[Norm2d, Callable[[int], nn.GroupNorm | nn.BatchNorm2d]] = {
    "group": group_norm,
    "batch": nn.BatchNorm2d,
}
"""Functions from the number of channels to the normalization layer for images."""
