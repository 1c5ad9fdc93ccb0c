"""The family `convnet`: a small convolutional image classifier. Independent of data, tasks and training."""

from collections import OrderedDict

from torch import nn

from maas_ray.models.families.images import PixelMean, image_layout
from maas_ray.models.families.layers import ACTIVATIONS, NORMS_2D
from maas_ray.models.params import ConvnetSpec
from maas_ray.row import Row


def build_convnet(spec: ConvnetSpec, row: Row, num_outputs: int) -> nn.Sequential:
    """Builds `layout`, `stage_0` …, `pool`, `dropout`, `head`: from [N, *row.shape] to logits [N, num_outputs].

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
