"""Decodes images with Pillow; runs in a child process, because its decoders are native code.

An image is made upright (EXIF orientation), 8 bits deep (the high byte of 16 bits), opaque (on a gray background), gray
or RGB, and is then scaled. Of several frames, the first one is used.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from maas_ray.arrays import Array
from maas_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
"""The image formats that are decoded; some other formats of Pillow start external programs."""
MAX_PIXELS = 1 << 26
"""Pixels of one image before it is scaled: 192 MiB in color."""
_MODES = {1: "L", 3: "RGB"}
_GRAY = ("1", "L", "LA", "La", "I", "F")
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How Exif 2.32, table 6 (tag Orientation), is undone."""
_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    OverflowError,
    TypeError,
    KeyError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
_OBJECT = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>|<[\w.]+ [^<>]*at 0x[0-9a-fA-F]+>")


class Undecodable(Exception):
    """An image that cannot be decoded; the message continues a sentence that begins with its name."""


def look(payload: Mapping[str, Any], blobs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Whether each image has colors, its height and its width, all of them upright; no pixel is decoded.

    Raises:
        DataError: one cannot be read as an image.
    """
    found = []
    for path, blob in zip(payload["paths"], blobs, strict=True):
        try:
            with _opened(blob) as image:
                width, height = image.size
                if find_orientation(image) >= 5:
                    width, height = height, width
                found.append([image.mode not in (*_GRAY, *_WIDE), height, width])
        except Undecodable as error:
            raise unreadable(path, error) from error
    return {"images": found}, []


def decode(payload: Mapping[str, Any], blobs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The pixels of images, uint8 [N, channels, height, width].

    Raises:
        DataError: one cannot be read as an image.
    """
    rows = np.empty((len(blobs), *payload["shape"]), dtype=np.uint8)
    for row, path, blob in zip(rows, payload["paths"], blobs, strict=True):
        try:
            row[:] = decode_image(blob, payload["shape"], payload["background"])
        except Undecodable as error:
            raise unreadable(path, error) from error
    return {}, [rows.data]


def decode_image(blob: Any, shape: Sequence[int], background: int) -> Array:
    """The pixels of one image, uint8 [channels, height, width].

    Args:
        blob: the content of its file.
        shape: channels (1 or 3), height and width; an image of another size is scaled (bilinear).
        background: gray level behind transparent pixels, 0 to 255.

    Raises:
        Undecodable: it is damaged, too large or of an unsupported kind.
    """
    channels, height, width = shape
    with _opened(blob) as image:
        turned = find_orientation(image)
        plain = _opaque(_eight_bits(image), background).convert(_MODES[channels])
        if turned in _UPRIGHT:
            plain = plain.transpose(_UPRIGHT[turned])
        if plain.size != (width, height):
            plain = plain.resize((width, height), Image.Resampling.BILINEAR)
        pixels: Array = np.asarray(plain, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
    return pixels


def unreadable(path: str, error: Exception) -> DataError:
    """The error for a file that is no image that can be decoded."""
    return DataError(f"cannot read {path} as an image: {error}; remove it")


def find_orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be undone; 1 for damaged EXIF data, which viewers ignore as well."""
    if image.format == "TIFF":  # Pillow undoes it itself
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _ERRORS:
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """The high byte of 16 bits, as Pillow reads colors of 16 bits; its own conversion of gray saturates at 255."""
    if image.mode in _WIDE or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8), "L")
    if image.mode in ("I", "F"):
        raise Undecodable(
            f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floating-point numbers'}, for which no value "
            "is white; save it with 8 or 16 bits"
        )
    return image


def _opaque(image: Image.Image, background: int) -> Image.Image:
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image
    colors = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    canvas = Image.new("RGBA", colors.size, (background, background, background, 255))
    canvas.alpha_composite(colors)
    return canvas.convert("RGB")


@contextmanager
def _opened(blob: Any) -> Iterator[Image.Image]:
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow itself warns above it, and rejects twice as many
    if not len(blob):
        raise Undecodable("it is empty")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # about damaged metadata, which do not matter
            if image.width * image.height > MAX_PIXELS:
                raise Undecodable(
                    f"it has {image.width} x {image.height} pixels; the limit is {MAX_PIXELS} pixels; scale it down"
                )
            yield image
    except UnidentifiedImageError as error:
        raise Undecodable(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from error
    except _ERRORS as error:
        raise Undecodable(_OBJECT.sub("the file", str(error)) or type(error).__name__) from error
