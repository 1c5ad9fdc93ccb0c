"""The family `encoder`: a bidirectional transformer with BERT's architecture. Independent of data, tasks and training.

Devlin et al. 2019 (BERT), with the normalization before each layer and not after it (Xiong et al. 2020), so that it
trains without a warm-up at any depth; with BERT's own order it does not.

Layers pass one tensor, the residual stream [N, T, width]. In padded rows the stream of a padding token is all zeros
from the embedding to the end, by which every layer recognizes padding: no token attends to it, and pooling ignores it.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from maas_ray.models.families.transformer import (
    draw_weights,
    sequence_length,
    shareable_plan,
)
from maas_ray.models.params import EncoderSpec
from maas_ray.row import Row


class TokenEmbedding(nn.Module):
    """The sum of the learned embeddings of token id and position; zeros for padding.

    Args:
        spec: the parameters.
        row: one row of tokens.
        max_length: number of positions.
    """

    def __init__(self, spec: EncoderSpec, row: Row, max_length: int) -> None:
        super().__init__()
        self.pad = row.pad
        self.tokens = nn.Embedding(row.vocab_size or 0, spec.num_values)
        self.positions = nn.Embedding(max_length, spec.num_values)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, token_ids: Tensor) -> Tensor:
        """From token ids [N, T] to the stream [N, T, width]."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        stream: Tensor = self.dropout(self.tokens(token_ids) + self.positions(positions))
        return stream if self.pad is None else stream * (token_ids != self.pad).unsqueeze(-1)


class Attention(nn.Module):
    """Multi-head attention of every token to every token.

    The number of heads is derived from the width of the projections' outputs, so that each rank of tensor parallelism
    has whole heads.

    Args:
        spec: the parameters.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.head_width = spec.num_values // spec.num_heads
        self.query = nn.Linear(spec.num_values, spec.num_values)
        self.key = nn.Linear(spec.num_values, spec.num_values)
        self.value = nn.Linear(spec.num_values, spec.num_values)
        self.output = nn.Linear(spec.num_values, spec.num_values)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """From [N, T, width] to the same; `attended` is bool [N, 1, 1, T]; None: every token is attended to."""
        n, length, _ = x.shape
        shape = (n, length, -1, self.head_width)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attended)
        result: Tensor = self.dropout(self.output(mixed.transpose(1, 2).reshape(n, length, -1)))
        return result


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, for each token.

    Args:
        spec: the parameters.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.num_values, spec.num_mlp_values)
        self.down = nn.Linear(spec.num_mlp_values, spec.num_values)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to the same."""
        result: Tensor = self.dropout(self.down(functional.gelu(self.up(x))))
        return result


class EncoderBlock(nn.Module):
    """Attention, then the feed-forward layer, each applied to the normalized residual stream and added to it.

    Args:
        spec: the parameters.
        has_padding: whether rows may contain padding.
    """

    def __init__(self, spec: EncoderSpec, has_padding: bool) -> None:
        super().__init__()
        self.has_padding = has_padding
        self.attention_norm = nn.LayerNorm(spec.num_values)
        self.attention = Attention(spec)
        self.mlp_norm = nn.LayerNorm(spec.num_values)
        self.mlp = FeedForward(spec)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to the same."""
        stream: Tensor
        if not self.has_padding:
            x = x + self.attention(self.attention_norm(x))
            stream = x + self.mlp(self.mlp_norm(x))
            return stream
        is_token = _is_token(x)
        # A row of only padding attends to itself: a softmax over an empty set is NaN.
        attended = is_token | ~is_token.any(dim=1, keepdim=True)
        x = x + self.attention(self.attention_norm(x), attended[:, None, None, :, 0])
        stream = (x + self.mlp(self.mlp_norm(x))) * is_token
        return stream


class SequencePool(nn.Module):
    """From the stream [N, T, width] to one vector per row [N, width].

    Args:
        kind: `mean` of all tokens, or the `first` one.
        has_padding: whether rows may contain padding.
    """

    def __init__(self, kind: str, has_padding: bool) -> None:
        super().__init__()
        self.kind = kind
        self.has_padding = has_padding

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, width]."""
        if self.kind == "first":
            return x[:, 0]
        if not self.has_padding:
            return x.mean(dim=1)
        return x.sum(dim=1) / _is_token(x).sum(dim=1).clamp(min=1)


class Encoder(nn.Sequential):
    """`embedding`, `block_0` …, then `norm`, `transform`, `head` per token, or `pool`, `norm`, `head` per row."""

    tp_plan: dict[str, str] = {  # noqa: RUF012  # replaced, never changed
        "embedding.tokens": "embedding_rowwise",
        "*.attention.query": "colwise",
        "*.attention.key": "colwise",
        "*.attention.value": "colwise",
        "*.attention.output": "rowwise",
        "*.mlp.up": "colwise",
        "*.mlp.down": "rowwise",
    }
    """How tensor parallelism splits the layers; without `embedding.tokens` and `head` if ranks cannot split them
    equally. The sequence is not split: positions and padding are those of whole rows."""
    tp_sizes: dict[str, int] = {}  # noqa: RUF012  # replaced, never changed
    """Other sizes that the number of ranks must divide."""


def build_classifier(spec: EncoderSpec, row: Row, num_outputs: int) -> Encoder:
    """Builds a module from token ids [N, T] to logits per row, [N, num_outputs].

    Raises:
        ModelError: the rows are not tokens, or have too many.
    """
    head: dict[str, nn.Module] = {
        "pool": SequencePool(spec.pool, row.pad is not None),  # before the normalization, which would hide padding
        "norm": nn.LayerNorm(spec.num_values),
        "head": nn.Linear(spec.num_values, num_outputs),
    }
    return _build(spec, row, head)


def build_masked(spec: EncoderSpec, row: Row, num_outputs: int) -> Encoder:
    """Builds a module from token ids [N, T] to logits per token, [N, T, num_outputs], for masked language modeling.

    Raises:
        ModelError: the rows are not tokens, or have too many.
    """
    transform = OrderedDict[str, nn.Module](
        linear=nn.Linear(spec.num_values, spec.num_values),
        activation=nn.GELU(),
        norm=nn.LayerNorm(spec.num_values),
    )  # as BERT's masked-language-model head
    head: dict[str, nn.Module] = {
        "norm": nn.LayerNorm(spec.num_values),
        "transform": nn.Sequential(transform),
        "head": nn.Linear(spec.num_values, num_outputs),
    }
    net = _build(spec, row, head)
    net.tp_plan = shareable_plan(net, net.tp_plan | {"head": "colwise_gather_output"}, spec.num_heads)
    return net


def _build(spec: EncoderSpec, row: Row, head: dict[str, nn.Module]) -> Encoder:
    max_length = sequence_length("encoder", row, spec.max_length)
    blocks = {f"block_{i}": EncoderBlock(spec, row.pad is not None) for i in range(spec.num_layers)}
    net = Encoder(OrderedDict[str, nn.Module](embedding=TokenEmbedding(spec, row, max_length), **blocks, **head))
    draw_weights(net, spec.num_layers)
    net.tp_sizes = {"attention heads": spec.num_heads}
    net.tp_plan = shareable_plan(net, net.tp_plan, spec.num_heads)
    return net


def _is_token(x: Tensor) -> Tensor:
    """Whether each token is not padding, bool [N, T, 1]."""
    return (x != 0).any(dim=-1, keepdim=True)
