"""The family `decoder`: a causal language model with Llama's architecture. Independent of data, tasks and training.

Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU),
Ainslie et al. 2023 (grouped-query attention).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from maas_ray.errors import ModelError
from maas_ray.models.families.transformer import (
    draw_weights,
    sequence_length,
    shareable_plan,
)
from maas_ray.models.params import DecoderSpec
from maas_ray.row import Row


class RotaryAttention(nn.Module):
    """Causal grouped-query attention with rotary position embedding of queries and keys.

    The number of heads is derived from the width of the projections' outputs, so that each rank of tensor parallelism
    has whole heads.

    Args:
        spec: the parameters.
        max_length: longest sequence in tokens.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: DecoderSpec, max_length: int) -> None:
        super().__init__()
        self.head_width = spec.num_values // spec.num_heads
        self.is_grouped = spec.num_kv_heads < spec.num_heads
        self.rope_theta = spec.rope_theta
        kv_width = self.head_width * spec.num_kv_heads
        self.query = nn.Linear(spec.num_values, spec.num_values, bias=False)
        self.key = nn.Linear(spec.num_values, kv_width, bias=False)
        self.value = nn.Linear(spec.num_values, kv_width, bias=False)
        self.output = nn.Linear(spec.num_values, spec.num_values, bias=False)
        self.dropout = nn.Dropout(spec.dropout)
        cos, sin = _rotations(self.head_width, max_length, spec.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, T, width]."""
        query = self.query(x)  # x may be a shard of the sequence, which this layer then gathers
        n, length, _ = query.shape
        shape = (n, length, -1, self.head_width)
        query = self._turned(query.view(shape).transpose(1, 2))
        key = self._turned(self.key(x).view(shape).transpose(1, 2))
        value = self.value(x).view(shape).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.is_grouped
        )  # [N, heads, T, head_width]
        result: Tensor = self.dropout(self.output(mixed.transpose(1, 2).reshape(n, length, -1)))
        return result

    def _turned(self, x: Tensor) -> Tensor:
        """Rotates the pairs (x[i], x[i + half]) of each head in x [N, heads, T, head_width] by the position's angle."""
        cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        return torch.addcmul(x * cos, x.roll(self.head_width // 2, -1), sin)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` for each token.

    Args:
        spec: the parameters.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.num_values, spec.num_mlp_values, bias=False)
        self.up = nn.Linear(spec.num_values, spec.num_mlp_values, bias=False)
        self.down = nn.Linear(spec.num_mlp_values, spec.num_values, bias=False)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, T, width]."""
        result: Tensor = self.dropout(self.down(functional.silu(self.gate(x)) * self.up(x)))
        return result


class DecoderBlock(nn.Module):
    """Attention, then SwiGLU, each applied to the normalized residual stream and added to it.

    Args:
        spec: the parameters.
        max_length: longest sequence in tokens.
    """

    def __init__(self, spec: DecoderSpec, max_length: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.num_values, eps=spec.norm_eps)
        self.attention = RotaryAttention(spec, max_length)
        self.mlp_norm = nn.RMSNorm(spec.num_values, eps=spec.norm_eps)
        self.mlp = SwiGLU(spec)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, T, width]."""
        x = x + self.attention(self.attention_norm(x))
        stream: Tensor = x + self.mlp(self.mlp_norm(x))
        return stream


class Decoder(nn.Sequential):
    """`embedding`, `dropout`, `block_0` …, `norm`, `head`: from token ids [N, T] to logits [N, T, num_outputs]."""

    tp_plan: dict[str, str] = {  # noqa: RUF012  # replaced, never changed
        "embedding": "embedding_rowwise",
        "*.attention_norm": "sequence_parallel",
        "*.attention.query": "colwise",
        "*.attention.key": "colwise",
        "*.attention.value": "colwise",
        "*.attention.output": "rowwise",
        "*.mlp_norm": "sequence_parallel",
        "*.mlp.gate": "colwise",
        "*.mlp.up": "colwise",
        "*.mlp.down": "rowwise",
        "norm": "sequence_parallel",
        "head": "colwise_gather_output",
    }
    """How tensor parallelism splits the layers; without `embedding` and `head` if ranks cannot split them equally."""
    tp_sizes: dict[str, int] = {}  # noqa: RUF012  # replaced, never changed
    """Other sizes that the number of ranks must divide."""


def build_decoder(spec: DecoderSpec, row: Row, num_outputs: int) -> Decoder:
    """Builds a module from token ids [N, T] to logits of each next token, [N, T, num_outputs].

    Raises:
        ModelError: the rows are not tokens or have too many, or tied weights do not fit the number of outputs.
    """
    max_length = sequence_length("decoder", row, spec.max_length)
    vocab_size = row.vocab_size or 0
    if spec.tied and num_outputs != vocab_size:
        raise ModelError(
            f"decoder: tied weights need one logit per token id; there are {num_outputs} logits and {vocab_size} "
            "token ids; set tied to false"
        )
    embedding = nn.Embedding(vocab_size, spec.num_values)
    head = nn.Linear(spec.num_values, num_outputs, bias=False)
    net = Decoder(
        OrderedDict[str, nn.Module](
            embedding=embedding,
            dropout=nn.Dropout(spec.dropout),
            **{f"block_{i}": DecoderBlock(spec, max_length) for i in range(spec.num_layers)},
            norm=nn.RMSNorm(spec.num_values, eps=spec.norm_eps),
            head=head,
        )
    )
    draw_weights(net, spec.num_layers)
    net.tp_sizes = {"heads of keys and values": spec.num_kv_heads}
    net.tp_plan = shareable_plan(net, net.tp_plan, spec.num_kv_heads)
    if spec.tied:
        head.weight = embedding.weight
        # Splitting both would turn one parameter into two.
        net.tp_plan = {name: style for name, style in net.tp_plan.items() if name not in ("embedding", "head")}
    return net


def _rotations(head_width: int, max_length: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [max_length, head_width] of the angles `position * theta ** (-2 i / head_width)`."""
    rates = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(max_length, dtype=torch.float64)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), 1).float(), torch.cat((-sin, sin), 1).float()
