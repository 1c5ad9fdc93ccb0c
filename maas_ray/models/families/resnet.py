"""The family `resnet`: residual image classifiers. Independent of data, tasks and training.

He et al. 2016, with the stride of a bottleneck in its 3x3 convolution, as in most implementations. Normalization gains
are initialized with one, not zero: zero helps runs of a hundred epochs (Goyal et al. 2017, section 5.1), but costs the
first hundred steps.
"""

from collections import OrderedDict

from torch import Tensor, nn

from maas_ray.models.families.images import PixelMean, image_layout
from maas_ray.models.families.layers import NORMS_2D
from maas_ray.models.params import ResnetSpec
from maas_ray.row import Row

BLOCKS: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Residual blocks of each stage, by depth."""
BOTTLENECK_DEPTH, BOTTLENECK_FACTOR = 50, 4
"""From this depth a block is 1x1, 3x3, 1x1, with four times the output channels of its 3x3."""
SMALL_IMAGE = 64
"""Pixels: for images up to this side length the stem keeps the resolution, as He et al. did for CIFAR."""


class ResidualBlock(nn.Module):
    """Convolutions whose result is added to their input, which is projected if its shape differs.

    Args:
        spec: the parameters.
        num_in: channels of the input.
        width: channels of the 3x3 convolutions.
        stride: stride of the first 3x3 convolution.
    """

    def __init__(self, spec: ResnetSpec, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        if spec.depth < BOTTLENECK_DEPTH:
            convolutions = [(num_in, width, 3, stride), (width, width, 3, 1)]
        else:
            convolutions = [(num_in, width, 1, 1), (width, width, 3, stride), (width, BOTTLENECK_FACTOR * width, 1, 1)]
        num_out = convolutions[-1][1]
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers += [*_normalized(spec, *convolution), nn.ReLU()]
        self.residual = nn.Sequential(*layers[:-1])
        is_same = stride == 1 and num_in == num_out
        self.shortcut = nn.Identity() if is_same else nn.Sequential(*_normalized(spec, num_in, num_out, 1, stride))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """From [N, num_in, H, W] to [N, num_out, H / stride, W / stride]."""
        summed: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return summed


def build_resnet(spec: ResnetSpec, row: Row, num_outputs: int) -> nn.Sequential:
    """Builds `layout`, `stem`, `stage_0_block_0` …, `pool`, `dropout`, `head`: [N, *row.shape] to [N, num_outputs].

    Raises:
        ModelError: the rows are not images.
    """
    layout, (channels, height, width) = image_layout("resnet", spec.layout, row)
    is_small = max(height, width) <= SMALL_IMAGE
    stem = [*_normalized(spec, channels, spec.width, *((3, 1) if is_small else (7, 2))), nn.ReLU()]
    if not is_small:
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    blocks: dict[str, nn.Module] = {}
    num_in = spec.width
    for stage, count in enumerate(BLOCKS[spec.depth]):
        for i in range(count):
            block = ResidualBlock(spec, num_in, spec.width * 2**stage, stride=2 if stage and not i else 1)
            blocks[f"stage_{stage}_block_{i}"] = block
            num_in = spec.width * 2**stage * (BOTTLENECK_FACTOR if spec.depth >= BOTTLENECK_DEPTH else 1)
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            layout=layout,
            stem=nn.Sequential(*stem),
            **blocks,
            pool=PixelMean(),
            dropout=nn.Dropout(spec.dropout),
            head=nn.Linear(num_in, num_outputs),
        )
    )


def _normalized(spec: ResnetSpec, num_in: int, num_out: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, NORMS_2D[spec.norm](num_out)]
