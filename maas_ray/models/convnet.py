"""The family `convnet`: a small image classifier of convolution stages. Knows nothing of data, tasks or training."""

from collections import OrderedDict

from pydantic import Field
from torch import nn

from maas_ray.models.images import Layout, PixelMean, image_layout
from maas_ray.models.layers import ACTIVATIONS, NORMS_2D, Activation, Norm2d
from maas_ray.models.row import Row
from maas_ray.spec import Spec

CHANNELS_PER_SIZE = 16


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
    norm: Norm2d = "group"
    """Normalization after each convolution. `batch` takes its statistics of one worker's micro-batch, which makes the
    result depend on the number of workers; `group` does not."""
    layout: Layout = "auto"
    """Order of a three-dimensional row: [C, H, W] or [H, W, C]. `auto` takes the latter if only the last size is a
    number of color channels (at most 4). Rows of two dimensions are [H, W] with one channel."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(CHANNELS_PER_SIZE * self.size * 2**stage for stage in range(self.size))


def build_convnet(spec: ConvnetSpec, row: Row, num_outputs: int) -> nn.Sequential:
    """`layout`, `stage_0` …, `pool`, `dropout`, `head`: from [N, *row.shape] to scores [N, num_outputs].

    Raises:
        ModelError: the rows are not images.
    """
    layout, (num_in, height, width) = image_layout("convnet", spec.layout, row)
    stages: dict[str, nn.Module] = {}
    for i, num_out in enumerate(spec.channels):
        layers: list[nn.Module] = []
        for num_channels in (num_in, num_out):
            layers.append(nn.Conv2d(num_channels, num_out, 3, padding=1))
            if spec.norm != "none":
                layers.append(NORMS_2D[spec.norm](num_out))
            layers.append(ACTIVATIONS[spec.activation]())
        if min(height, width) > 1:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        stages[f"stage_{i}"] = nn.Sequential(*layers)
        num_in = num_out
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            layout=layout,
            **stages,
            pool=PixelMean(),
            dropout=nn.Dropout(spec.dropout),
            head=nn.Linear(num_in, num_outputs),
        )
    )
