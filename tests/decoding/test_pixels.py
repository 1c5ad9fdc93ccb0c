"""Every kind of image file becomes the pixels that a viewer shows."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maas_ray.decoding import pixels
from maas_ray.decoding.pixels import Undecodable, decode, decode_image, look
from maas_ray.errors import DataError

_WIDE = np.array([[0, 256, 0x1234], [0x8000, 0xFF00, 0xFFFF]], np.uint16)
_ARROW = np.array([[0, 50, 100], [150, 200, 250]], np.uint8)
"""Differs from each of its own rotations and reflections."""
_TURNED: dict[int, Any] = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda x: np.rot90(x.T, 2),
    8: lambda x: np.rot90(x, 3),
}
"""What a camera stores for an upright picture, by EXIF orientation (Exif 2.32, table 6)."""


def _file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _turned(orientation: int, form: str, content: np.ndarray = _ARROW) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(_TURNED[orientation](content)))
    return _file(stored, form, exif=exif)


def _is_upright(blob: bytes) -> bool:
    return np.array_equal(decode_image(blob, (1, *_ARROW.shape), 255)[0], _ARROW)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", _TURNED)
def test_exif_orientation_is_undone(form: str, orientation: int) -> None:
    blob = _turned(orientation, form)
    assert _is_upright(blob)
    assert look({"paths": ["x"]}, [blob])[0]["images"] == [[False, *_ARROW.shape]]


def test_exif_orientation_of_jpeg_and_webp_is_undone() -> None:
    content = np.zeros((16, 8), np.uint8)
    content[:8] = 200  # the upper half, which survives compression
    for form in ("JPEG", "WEBP"):
        found = decode_image(_turned(6, form, content), (1, 16, 8), 255)[0]
        assert np.abs(found.astype(int) - content).max() < 20, form


def test_a_decoder_that_ignores_exif_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "find_orientation", lambda image: 1)
    assert not _is_upright(_turned(3, "PNG"))


def test_damaged_exif_data_do_not_matter() -> None:
    assert _is_upright(_file(Image.fromarray(_ARROW), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))


@pytest.mark.parametrize(
    "blob",
    [
        _file(Image.fromarray(_WIDE)),
        _file(Image.fromarray(_WIDE), "TIFF"),
        _file(Image.fromarray(_WIDE.astype(">u2")), "TIFF"),
    ],
    ids=["png", "tif", "tif big-endian"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_high_byte_of_sixteen_bits_is_used(blob: bytes, channels: int) -> None:
    found = decode_image(blob, (channels, 2, 3), 255)
    assert (found == (_WIDE >> 8)).all()
    assert not look({"paths": ["x"]}, [blob])[0]["images"][0][0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
@pytest.mark.parametrize("background", [255, 0, 40])
def test_transparent_pixels_show_the_background(mode: str, background: int) -> None:
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (200, 200, 200, 0))
    blob = _file(
        image.convert("P").convert("PA") if mode == "PA" else image.convert(mode), "TIFF" if mode == "PA" else "PNG"
    )
    if mode == "PA":  # no format stores it; a palette with transparent entries is the same
        blob = _file(image.quantize(4), "PNG")
    for channels in (1, 3):
        found = decode_image(blob, (channels, 1, 2), background)
        assert (found[:, 0, 0] == 200).all()
        assert (found[:, 0, 1] == background).all()


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    blob = _file(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert decode_image(blob, (3, 1, 1), 255).ravel().tolist() == [127, 127, 127]


def test_the_first_frame_of_a_gif_and_a_tif_is_used() -> None:
    first, second = Image.new("L", (2, 2), 30), Image.new("L", (2, 2), 220)
    for form in ("GIF", "TIFF"):
        blob = _file(first, form, save_all=True, append_images=[second])
        assert (decode_image(blob, (1, 2, 2), 255) == 30).all()


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "it is empty"),
        (b"# no image", "it is none of PNG, JPEG"),
        (_file(Image.fromarray(_ARROW))[:50], "truncated|broken|Truncated"),
        (
            _file(Image.fromarray(_ARROW.astype(np.float32)), "TIFF"),
            "floating-point numbers, for which no value is white",
        ),
        (_file(Image.fromarray(_ARROW.astype(np.int32)), "TIFF"), "32-bit integers"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_by_its_name(blob: bytes, reason: str) -> None:
    payload = {"paths": ["cat/1.png"], "shape": [1, 2, 3], "background": 255}
    with pytest.raises(DataError, match=f"^cannot read cat/1.png as an image: .*({reason})") as caught:
        decode(payload, [blob])
    assert "object at" not in str(caught.value)
    with pytest.raises(Undecodable):
        decode_image(blob, (1, 2, 3), 255)
