"""Layers and checks for image rows: layout, sizes, and pixel mean. Independent of model families."""

from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.models.params import ImageLayout
from maas_ray.row import Row

MAX_COLOR_CHANNELS = 4


class ChannelsFirst(nn.Module):
    """Converts images from the layout of their rows to [N, C, H, W].

    Args:
        order: `no_channels`, `channels_first` or `channels_last`.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        """From [N, H, W], [N, C, H, W] or [N, H, W, C] to [N, C, H, W]."""
        if self.order == "no_channels":
            return images.unsqueeze(1)
        return images.permute(0, 3, 1, 2) if self.order == "channels_last" else images

    def extra_repr(self) -> str:
        return self.order


class PixelMean(nn.Module):
    """The mean over all pixels: one vector per image of any size."""

    def forward(self, images: Tensor) -> Tensor:
        """From [N, C, H, W] to [N, C]."""
        return images.mean(dim=(2, 3))


def image_layout(name: str, layout: ImageLayout, row: Row) -> tuple[ChannelsFirst, tuple[int, int, int]]:
    """The layer that converts rows to [N, C, H, W], and the sizes C, H and W.

    Args:
        name: name of the model, for the message.
        layout: layout in the spec.
        row: one preprocessed row.

    Raises:
        ModelError: the rows are not images.
    """
    shape = row.shape
    if len(shape) == 2:
        return ChannelsFirst("no_channels"), (1, *shape)
    if len(shape) != 3:
        raise ModelError(
            f"{name} needs images, rows of the shape [C, H, W] or [H, W]; these rows have the shape {list(shape)}; "
            f"use the model {'encoder' if row.is_tokens else 'mlp'!r}, or a data source with images"
        )
    is_last = shape[2] <= MAX_COLOR_CHANNELS < shape[0]
    if layout == "channels_last" or (layout == "auto" and is_last):
        return ChannelsFirst("channels_last"), (shape[2], shape[0], shape[1])
    return ChannelsFirst("channels_first"), (shape[0], shape[1], shape[2])
