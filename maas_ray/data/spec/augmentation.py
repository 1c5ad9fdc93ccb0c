"""The user's augmentation of training images. Specification only."""

from typing import Self

from pydantic import Field, NonNegativeInt, model_validator

from maas_ray.data.spec.features import Features, TensorColumn
from maas_ray.errors import SpecError
from maas_ray.spec import Spec


class AugmentationSpec(Spec):
    """Random changes of the training images; held-out images and the endpoint are never augmented.

    They are a function of the seed, the sample and the epoch: the same on every layout, and after a resume.
    """

    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    crop: NonNegativeInt = 0
    """Largest shift in pixels, horizontally and vertically; pixels beyond the edge repeat the mirrored image. At most
    half the height and the width."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """All pixels are multiplied by a number between 1 - `brightness` and 1 + `brightness`; for images of bytes."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Differences from the image's mean are multiplied by a number in the same way; for images of bytes."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """Differences from the pixel's gray level are multiplied by a number in the same way; for images with colors."""
    mixup: float = Field(default=0.0, ge=0, le=1)
    """Each image and its target are mixed with those of a random image of the training split, with a share from the
    beta distribution with both parameters equal to this number (Zhang et al. 2018, "mixup"); 0: not mixed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self == type(self).model_construct():
            raise ValueError("augmentation has no effect; set at least one of its fields, or remove it")
        return self

    @property
    def has_color(self) -> bool:
        """Whether values of pixels change."""
        return bool(self.brightness or self.contrast or self.saturation)


def refuse_augmentation(spec: AugmentationSpec, features: Features) -> None:
    """Refuses an augmentation of rows that are no images, or that has no meaning for them.

    Raises:
        SpecError: the only column must be an image [1 or 3, height, width].
    """
    column = features.columns[0]
    if len(features.columns) != 1 or not isinstance(column, TensorColumn) or len(column.shape) != 3:
        raise SpecError("augmentation: the rows are no images [channels, height, width]; remove it")
    channels, height, width = column.shape
    if channels not in (1, 3):
        raise SpecError(f"augmentation: images of {channels} channels are not supported, only 1 or 3; remove it")
    if spec.crop > min(height, width) // 2:
        raise SpecError(
            f"augmentation.crop: {spec.crop} pixels are more than half of {height} x {width}; the limit is "
            f"{min(height, width) // 2}"
        )
    if spec.has_color and column.datatype != "UINT8":
        raise SpecError(
            "augmentation: brightness, contrast and saturation need images of bytes, whose black and white are known; "
            "remove them, or store the images as uint8"
        )
    if spec.saturation and channels != 3:
        raise SpecError("augmentation.saturation: the images are gray; remove it")
    if spec.mixup and features.is_per_token:
        raise SpecError("augmentation.mixup: tokens cannot be mixed; remove it")
