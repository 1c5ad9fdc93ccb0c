"""Decodes images with Pillow; runs in a child process, because its decoders are native code."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from maas_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
"""The image formats that are decoded; some other formats of Pillow start external programs."""
MAX_PIXELS = 1 << 26
"""Pixels of one image before it is scaled: 192 MiB in color."""
_MODES = {1: "L", 3: "RGB"}
_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    OverflowError,
    TypeError,
    KeyError,
    IndexError,
    Image.DecompressionBombError,
)


def look(payload: Mapping[str, Any], blobs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The channels, height and width of one image.

    Raises:
        DataError: it cannot be read as an image.
    """
    with _opened(payload["paths"][0], blobs[0]) as image:
        channels = 1 if image.mode in ("1", "L", "I;16") else 3
        return {"channels": channels, "height": image.height, "width": image.width}, []


def decode(payload: Mapping[str, Any], blobs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The pixels of images, uint8 [N, channels, height, width].

    Raises:
        DataError: one cannot be read as an image.
    """
    channels, height, width = payload["shape"]
    rows = np.empty((len(blobs), channels, height, width), dtype=np.uint8)
    for row, path, blob in zip(rows, payload["paths"], blobs, strict=True):
        with _opened(path, blob) as image:
            plain = image.convert(_MODES[channels])
            if plain.size != (width, height):
                plain = plain.resize((width, height), Image.Resampling.BILINEAR)
            row[:] = np.asarray(plain, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
    return {}, [rows.data]


@contextmanager
def _opened(path: str, blob: Any) -> Iterator[Image.Image]:
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow itself warns above it, and rejects twice as many
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} is an image of {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}; scale it "
                    "down"
                )
            yield image
    except _ERRORS as error:
        raise DataError(f"cannot read {path} as an image: {error}; remove it") from error
