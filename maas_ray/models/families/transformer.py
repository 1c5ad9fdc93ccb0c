"""Shared functions of the families `decoder` and `encoder`: sequence length, tensor parallel plan, initialization."""

from collections.abc import Mapping
from math import sqrt

from torch import nn

from maas_ray.errors import ModelError
from maas_ray.row import Row

WEIGHT_STD = 0.02
"""Standard deviation of initial weights, as in GPT-2, BERT and Llama."""


def sequence_length(name: str, row: Row, max_length: int | None) -> int:
    """The longest sequence that a model must accept.

    Raises:
        ModelError: the rows are not tokens, or have more than `max_length`.
    """
    if not row.is_tokens or len(row.shape) != 1:
        raise ModelError(
            f"{name} needs tokens, rows of int64 token ids of the shape [T]; these rows are values of the shape "
            f"{list(row.shape)}; use the model 'mlp', or a task on text"
        )
    length = row.shape[0]
    if max_length is not None and length > max_length:
        raise ModelError(
            f"{name} has max_length {max_length}, but the rows have {length} tokens; raise max_length, or lower "
            "data.text.seq_len"
        )
    return max_length or length


def shareable_plan(net: nn.Module, plan: Mapping[str, str], num_heads: int) -> dict[str, str]:
    """A plan without the layers over token ids that ranks cannot split equally; each rank then has a full copy of them.

    Args:
        net: the model.
        plan: styles of tensor parallelism by layer name pattern.
        num_heads: a number that every possible number of ranks divides.
    """

    def is_shared(name: str, style: str) -> bool:
        if style not in ("embedding_rowwise", "colwise_gather_output") or "*" in name:
            return True
        return net.get_parameter(f"{name}.weight").shape[0] % num_heads == 0

    return {name: style for name, style in plan.items() if is_shared(name, style)}


def draw_weights(net: nn.Module, num_layers: int) -> None:
    """Initializes linear and embedding weights from a normal distribution, and biases with zero.

    The layers named `output` and `down`, which add to the residual stream, are smaller by a factor of sqrt(2 * layers),
    so that the stream does not grow with the depth (Radford et al. 2019, GPT-2, section 2.3).
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            is_residual = name.rpartition(".")[2] in ("output", "down")
            nn.init.normal_(layer.weight, std=WEIGHT_STD / sqrt(2 * num_layers) if is_residual else WEIGHT_STD)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
