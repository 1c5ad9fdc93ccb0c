"""The family `convnet`: a small image classifier of convolution stages. Knows nothing of data, tasks or training."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.models.layers import ACTIVATIONS, Activation, group_norm
from maas_ray.models.row import Row
from maas_ray.spec import Spec

CHANNELS_PER_SIZE = 16
MAX_COLOR_CHANNELS = 4


class ConvnetSpec(Spec):
    """Parameters of `convnet`. The one dial is `size`: so many stages; the first has `16 * size` channels.

    Each stage is two 3x3 convolutions, each followed by a normalization and an activation, and a 2x2 max pooling that
    is left out once an image side is a single pixel; the channels double from stage to stage. The mean over the
    remaining pixels feeds one linear layer, so that any image size is accepted.
    """

    size: int = Field(default=2, ge=1, le=8)
    """Number of stages; the first has 16 times this number of channels, each further one twice as many."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the pooled values zeroed in training, before the linear layer."""
    activation: Activation = "relu"
    """Nonlinearity after each convolution."""
    norm: Literal["none", "group", "batch"] = "group"
    """Normalization after each convolution. `batch` takes its statistics of one worker's micro-batch, which makes the
    result depend on the number of workers; `group` does not."""
    layout: Literal["auto", "channels_first", "channels_last"] = "auto"
    """Order of a three-dimensional row: [C, H, W] or [H, W, C]. `auto` takes the latter if only the last size is a
    number of color channels (at most 4). Rows of two dimensions are [H, W] with one channel."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(CHANNELS_PER_SIZE * self.size * 2**stage for stage in range(self.size))


class Convnet(nn.Module):
    """From images to scores; see `ConvnetSpec`.

    Args:
        spec: the parameters.
        input_shape: [C, H, W], [H, W, C] or [H, W].
        num_outputs: scores per row.

    Raises:
        ModelError: the rows are not images.
    """

    def __init__(self, spec: ConvnetSpec, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self._layout, (channels, height, width) = _image_shape(spec, input_shape)
        stages: list[nn.Module] = []
        for stage_channels in spec.channels:
            for num_in in (channels, stage_channels):
                stages.append(nn.Conv2d(num_in, stage_channels, 3, padding=1))
                if spec.norm == "group":
                    stages.append(group_norm(stage_channels))
                elif spec.norm == "batch":
                    stages.append(nn.BatchNorm2d(stage_channels))
                stages.append(ACTIVATIONS[spec.activation]())
            if min(height, width) > 1:
                stages.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            channels = stage_channels
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(spec.dropout)
        self.output = nn.Linear(channels, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """From [N, *input_shape] to scores [N, num_outputs]."""
        if self._layout == "no_channels":
            images = images.unsqueeze(1)
        elif self._layout == "channels_last":
            images = images.permute(0, 3, 1, 2)
        pooled: Tensor = self.stages(images).mean(dim=(2, 3))
        scores: Tensor = self.output(self.dropout(pooled))
        return scores


def build_convnet(spec: ConvnetSpec, row: Row, num_outputs: int) -> nn.Module:
    """A module from [N, *row.shape] to [N, num_outputs]; see `Convnet`."""
    return Convnet(spec, row.shape, num_outputs)


def _image_shape(spec: ConvnetSpec, shape: tuple[int, ...]) -> tuple[str, tuple[int, int, int]]:
    """The layout and [C, H, W] of rows of this shape."""
    if len(shape) == 2:
        return "no_channels", (1, *shape)
    if len(shape) != 3:
        raise ModelError(
            f"convnet needs images, rows of the shape [C, H, W] or [H, W]; these rows have the shape {list(shape)}; "
            "use the model 'mlp', or a data source that gives images"
        )
    is_last = shape[2] <= MAX_COLOR_CHANNELS < shape[0]
    if spec.layout == "channels_last" or (spec.layout == "auto" and is_last):
        return "channels_last", (shape[2], shape[0], shape[1])
    return "channels_first", shape
