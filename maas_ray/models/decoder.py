"""The family `decoder`: a causal language model in Llama's shape. Knows nothing of data, tasks or training.

Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU),
Ainslie et al. 2023 (grouped-query attention).
"""

from collections import OrderedDict
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from maas_ray.errors import ModelError
from maas_ray.models.row import Row
from maas_ray.models.transformer import (
    TransformerSpec,
    draw_weights,
    refuse_heads,
    sequence_length,
    shareable_plan,
)

MLP_MULTIPLE = 64


class DecoderSpec(TransformerSpec):
    """Parameters of `decoder`. The one dial is `size`: so many layers and heads, `64 * size` wide.

    Size 12 is the shape of GPT-2 small: 12 layers, 12 heads, 768 wide.
    """

    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values, each shared by the same number of query heads; None: as many as `heads`."""
    mlp_width: int | None = Field(default=None, ge=1)
    """Values inside the SwiGLU layer; None: 8/3 of the width, rounded up to a multiple of 64."""
    rope_theta: float = Field(default=10_000.0, gt=1.0)
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = Field(default=1e-6, gt=0.0)
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """The output layer shares the weights of the token embedding (Press & Wolf 2017)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_heads(self.num_values, self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"heads is {self.num_heads} and kv_heads is {self.num_kv_heads}, which does not divide it; "
                "each head of keys and values serves the same number of query heads"
            )
        if self.num_values // self.num_heads % 2:
            raise ValueError(
                f"a head has width / heads = {self.num_values // self.num_heads} values; the rotary embedding turns pairs: "
                "it has to be even"
            )
        return self

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.num_heads

    @property
    def num_mlp_values(self) -> int:
        """Values inside the SwiGLU layer."""
        return self.mlp_width or -(-8 * self.num_values // (3 * MLP_MULTIPLE)) * MLP_MULTIPLE


class RotaryAttention(nn.Module):
    """Causal grouped-query attention; positions enter by turning queries and keys.

    Heads are counted from the width of what the projections give, so that ranks of tensor parallelism hold whole heads.

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
        query = self.query(x)  # x may be a piece of the sequence, which this layer then makes whole
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
        """Turns the pairs (x[i], x[i + half]) of each head by the angle of their position; x is [N, heads, T, head_width]."""
        cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        return torch.addcmul(x * cos, x.roll(self.head_width // 2, -1), sin)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` on each token.

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
    """Attention, then SwiGLU, each on the normalized stream and added to it.

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
    """`embedding`, `dropout`, `block_0` …, `norm`, `head`: from codes [N, T] to scores [N, T, num_outputs]."""

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
    """How tensor parallelism cuts the layers; `embedding` and `head` are left out where ranks could not share them equally."""
    tp_sizes: dict[str, int] = {}  # noqa: RUF012  # replaced, never changed
    """What else the number of ranks has to divide."""


def build_decoder(spec: DecoderSpec, row: Row, num_outputs: int) -> Decoder:
    """A module from codes [N, T] to scores of the token that follows each, [N, T, num_outputs].

    Raises:
        ModelError: the rows hold no tokens or too many, or tied weights do not fit the number of outputs.
    """
    max_length = sequence_length("decoder", row, spec.max_length)
    vocab_size = row.vocab_size or 0
    if spec.tied and num_outputs != vocab_size:
        raise ModelError(
            f"decoder: tied weights need as many scores as token codes; there are {num_outputs} scores and {vocab_size} "
            "codes; set tied to false"
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
        # Cutting both would make two parameters of one.
        net.tp_plan = {name: style for name, style in net.tp_plan.items() if name not in ("embedding", "head")}
    return net


def _rotations(head_width: int, max_length: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [max_length, head_width] of the angles `position * theta ** (-2 i / head_width)`."""
    rates = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(max_length, dtype=torch.float64)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), 1).float(), torch.cat((-sin, sin), 1).float()
