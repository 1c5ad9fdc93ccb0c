"""The family `mlp`: fully connected layers on the flattened row. Knows nothing of data, tasks or training."""

from itertools import pairwise
from math import prod
from typing import Literal

from pydantic import Field
from torch import nn

from maas_ray.errors import ModelError
from maas_ray.models.layers import ACTIVATIONS, Activation
from maas_ray.models.row import Row
from maas_ray.spec import Spec

WIDTH_PER_SIZE = 64


class MlpSpec(Spec):
    """Parameters of `mlp`. The one dial is `size`: so many hidden layers, each `64 * size` wide."""

    size: int = Field(default=2, ge=1, le=64)
    """Number of hidden layers; their width is 64 times this number."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of hidden values zeroed in training, after each activation."""
    activation: Activation = "relu"
    """Nonlinearity after each hidden layer."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Normalization before each activation. `batch` takes its statistics of one worker's micro-batch, which therefore
    needs two rows or more, and makes the result depend on the number of workers; `layer` has neither property."""

    @property
    def width(self) -> int:
        """Values per hidden layer."""
        return WIDTH_PER_SIZE * self.size


def build_mlp(spec: MlpSpec, row: Row, num_outputs: int) -> nn.Module:
    """A module from [N, *row.shape] to [N, num_outputs]."""
    if row.is_tokens:
        raise ModelError("mlp needs values, and these rows are codes of tokens; use the model 'encoder' or 'decoder'")
    widths = [prod(row.shape), *[spec.width] * spec.size]
    layers: list[nn.Module] = [nn.Flatten()]
    for num_in, num_out in pairwise(widths):
        layers.append(nn.Linear(num_in, num_out))
        if spec.norm == "layer":
            layers.append(nn.LayerNorm(num_out))
        elif spec.norm == "batch":
            layers.append(nn.BatchNorm1d(num_out))
        layers.append(ACTIVATIONS[spec.activation]())
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))
