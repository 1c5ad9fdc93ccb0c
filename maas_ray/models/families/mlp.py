"""The family `mlp`: fully connected layers on the flattened row. Independent of data, tasks and training."""

from collections import OrderedDict
from math import prod

from torch import nn

from maas_ray.errors import ModelError
from maas_ray.models.families.layers import ACTIVATIONS
from maas_ray.models.params import MlpSpec
from maas_ray.row import Row


class Mlp(nn.Sequential):
    """`flatten`, `hidden_0` …, `head`: from [N, *shape] to logits [N, num_outputs]."""

    tp_plan: dict[str, str] = {}  # noqa: RUF012  # replaced, never changed
    """How tensor parallelism splits the layers."""


def build_mlp(spec: MlpSpec, row: Row, num_outputs: int) -> Mlp:
    """Builds a module from [N, *row.shape] to [N, num_outputs].

    Raises:
        ModelError: the rows are tokens.
    """
    if row.is_tokens:
        raise ModelError("mlp needs values, but these rows are token ids; use the model 'encoder' or 'decoder'")
    hidden: dict[str, nn.Module] = {}
    width = prod(row.shape)
    for i in range(spec.size):
        layers: dict[str, nn.Module] = {"linear": nn.Linear(width, spec.width)}
        width = spec.width
        if spec.norm != "none":
            layers["norm"] = nn.LayerNorm(width) if spec.norm == "layer" else nn.BatchNorm1d(width)
        layers["activation"] = ACTIVATIONS[spec.activation]()
        layers["dropout"] = nn.Dropout(spec.dropout)
        hidden[f"hidden_{i}"] = nn.Sequential(OrderedDict(layers))
    net = Mlp(OrderedDict[str, nn.Module](flatten=nn.Flatten(), **hidden, head=nn.Linear(width, num_outputs)))
    net.tp_plan = _tp_plan(spec)
    return net


def _tp_plan(spec: MlpSpec) -> dict[str, str]:
    """Pairs of linear layers, the first split by outputs and the second by inputs: one all-reduce for each pair.

    A normalization needs all values of its layer, so with normalizations each layer gathers its outputs.
    """
    names = [*(f"hidden_{i}.linear" for i in range(spec.size)), "head"]
    if spec.norm != "none":
        return dict.fromkeys(names[:-1], "colwise_gather_output")
    paired = names[: len(names) // 2 * 2]
    return {name: "rowwise" if i % 2 else "colwise" for i, name in enumerate(paired)}
