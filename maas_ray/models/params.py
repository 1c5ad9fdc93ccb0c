"""The parameters of each model family. Independent of torch, so that a spec is read without it."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from maas_ray.spec import Spec

Activation = Literal["relu", "gelu", "tanh", "silu", "leaky_relu", "elu"]
Norm2d = Literal["none", "group", "batch"]
ImageLayout = Literal["auto", "channels_first", "channels_last"]
"""Order of a three-dimensional row: [C, H, W] or [H, W, C]. `auto` selects the latter if only the last size can be a
number of color channels (at most 4). Rows of two dimensions are [H, W] with one channel."""
Initialization = Literal[
    "default", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal", "normal"
]  # fmt: skip

WIDTH_PER_SIZE = 64
CHANNELS_PER_SIZE = 16
MLP_MULTIPLE = 64
PREFIX = "hf:"


class MlpSpec(Spec):
    """Parameters of `mlp`. The main parameter is `size`: `size` hidden layers with a width of `64 * size`."""

    size: int = Field(default=2, ge=1, le=64)
    """Number of hidden layers; their width is 64 times this number."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of hidden values zeroed in training, after each activation."""
    activation: Activation = "relu"
    """Nonlinearity after each hidden layer."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Normalization before each activation. `batch` computes its statistics over one worker's micro-batch, which
    therefore needs at least two rows, and makes the result depend on the number of workers; `layer` does neither."""

    @property
    def width(self) -> int:
        """Values per hidden layer."""
        return WIDTH_PER_SIZE * self.size


class ConvnetSpec(Spec):
    """Parameters of `convnet`. The main parameter is `size`: `size` stages, the first with `16 * size` channels.

    Each stage is two 3x3 convolutions, each followed by a normalization and an activation, and a 2x2 max pooling that
    is omitted once an image side is a single pixel; the channels double from stage to stage. The mean over the
    remaining pixels is the input of one linear layer, so any image size is accepted.
    """

    size: int = Field(default=2, ge=1, le=8)
    """Number of stages; the first has 16 times this number of channels, each further one twice as many as before."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the pooled values zeroed in training, before the linear layer."""
    activation: Activation = "relu"
    """Nonlinearity after each convolution."""
    norm: Norm2d = "group"
    """Normalization after each convolution. `batch` takes its statistics of one worker's micro-batch, which makes the
    result depend on the number of workers; `group` does not."""
    layout: ImageLayout = "auto"
    """Order of a three-dimensional row: [C, H, W] or [H, W, C]. `auto` takes the latter if only the last size is a
    number of color channels (at most 4). Rows of two dimensions are [H, W] with one channel."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(CHANNELS_PER_SIZE * self.size * 2**stage for stage in range(self.size))


class ResnetSpec(Spec):
    """Parameters of `resnet`. The main parameter is `depth`."""

    depth: Literal[18, 34, 50] = 18
    """Number of layers with weights: 18 and 34 have blocks of two 3x3 convolutions, 50 has bottleneck blocks."""
    width: int = Field(default=64, ge=8, le=512)
    """Channels of the first stage; each of the three further stages has twice as many as the previous."""
    norm: Literal["group", "batch"] = "group"
    """Normalization after each convolution. `batch` takes its statistics of one worker's micro-batch, which makes the
    result depend on the number of workers; `group` does not (Wu & He 2018)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the pooled values zeroed in training, before the linear layer."""
    layout: ImageLayout = "auto"
    """Order of a three-dimensional row: [C, H, W] or [H, W, C]. `auto` takes the latter if only the last size is a
    number of color channels (at most 4). Rows of two dimensions are [H, W] with one channel."""


class TransformerSpec(Spec):
    """Parameters of a transformer. The main parameter is `size`: `size` layers and heads, a width of `64 * size`."""

    size: int = Field(default=4, ge=1, le=128)
    """Default number of layers and heads; the default width is 64 times this number."""
    layers: int | None = Field(default=None, ge=1, le=1024)
    """Number of blocks; None: `size`."""
    width: int | None = Field(default=None, ge=1)
    """Values per token between the blocks; None: 64 times `size`."""
    heads: int | None = Field(default=None, ge=1)
    """Number of attention heads, which must divide the width; None: `size`."""
    max_length: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens; None: that of the training rows."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of values zeroed in training, in the embedding and in the output of each attention and feed-forward
    layer."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.layers or self.size

    @property
    def num_values(self) -> int:
        """Values per token between the blocks."""
        return self.width or WIDTH_PER_SIZE * self.size

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self.heads or self.size


def refuse_heads(width: int, heads: int) -> None:
    """Raises ValueError if the number of heads does not divide the width."""
    if width % heads:
        near = max(count for count in range(1, heads) if width % count == 0)
        raise ValueError(f"heads {heads} does not divide width {width}; use {near} heads")


class DecoderSpec(TransformerSpec):
    """Parameters of `decoder`. The main parameter is `size`: `size` layers and heads, with a width of `64 * size`.

    Size 12 is the shape of GPT-2 small: 12 layers, 12 heads, 768 wide.
    """

    kv_heads: int | None = Field(default=None, ge=1)
    """Number of key-value heads, each shared by the same number of query heads; None: as many as `heads`."""
    mlp_width: int | None = Field(default=None, ge=1)
    """Values inside the SwiGLU layer; None: 8/3 of the width, rounded up to a multiple of 64."""
    rope_theta: float = Field(default=10_000.0, gt=1.0)
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = Field(default=1e-6, gt=0.0)
    """Constant added to the mean square in RMSNorm."""
    tied: bool = False
    """Whether the output layer shares the weights of the token embedding (Press & Wolf 2017)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_heads(self.num_values, self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"kv_heads {self.num_kv_heads} does not divide heads {self.num_heads}; "
                "each key-value head must serve the same number of query heads"
            )
        if self.num_values // self.num_heads % 2:
            raise ValueError(
                f"a head has width / heads = {self.num_values // self.num_heads} values; the number must be even, "
                "because the rotary embedding rotates pairs; change width or heads"
            )
        return self

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.num_heads

    @property
    def num_mlp_values(self) -> int:
        """Values inside the SwiGLU layer."""
        return self.mlp_width or -(-8 * self.num_values // (3 * MLP_MULTIPLE)) * MLP_MULTIPLE


class EncoderSpec(TransformerSpec):
    """Parameters of `encoder`. The main parameter is `size`: `size` layers and heads, with a width of `64 * size`.

    Size 12 is the shape of BERT base: 12 layers, 12 heads, 768 wide.
    """

    mlp_width: int | None = Field(default=None, ge=1)
    """Values inside the feed-forward layer; None: four times the width."""
    pool: Literal["mean", "first"] = "mean"
    """Classification: the pooling of tokens before the classifier, the mean of all tokens or the first token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_heads(self.num_values, self.num_heads)
        return self

    @property
    def num_mlp_values(self) -> int:
        """Values inside the feed-forward layer."""
        return self.mlp_width or 4 * self.num_values


class HuggingFaceSpec(Spec):
    """Parameters of `hf:<Class>`: a configuration by `config`, or a local folder by `path`."""

    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the class's configuration; other fields have the package's defaults. `vocab_size`, `num_labels`,
    `num_channels` and `image_size` are taken from the data."""
    path: str | None = None
    """A local folder with config.json and safetensors, from whose weights training starts; it must exist on every node
    that builds the model. Pickled weights are not read."""
    ignore_layers: bool = Field(default=False, exclude_if=lambda value: not value)
    """Leave out layers of the folder's weights beyond the number in its config.json, instead of refusing the folder."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Implementation of attention. If the configuration has an attention dropout, training uses an explicit
    implementation instead, so that the dropout mask depends on the sample; it needs memory for the attention weights of
    all pairs of tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.config:
            raise ValueError(
                "config and path exclude each other: the folder has its own config.json; remove one of them"
            )
        return self
