"""How an input's encoded values are decoded, as plain JSON: part of the fitted features and of a bundle."""

from typing import Literal

from pydantic import Field

from maas_ray.spec import Spec


class ImageEncoding(Spec):
    """Image files (PNG, JPEG, BMP, WEBP, TIFF or GIF), decoded to uint8 [channels, height, width] by pixels.py."""

    kind: Literal["image"] = "image"
    background: int = Field(default=255, ge=0, le=255)
    """Gray level behind transparent pixels."""


class TextEncoding(Spec):
    """Texts in UTF-8: their first tokens, padded."""

    kind: Literal["text"] = "text"
    length: int = Field(ge=1)
    """Tokens per row."""
    pad: int = Field(ge=0)
    """Token id that pads shorter texts."""
    tokenizer: str
    """Hex sha256 of the tokenizer's JSON file."""
