"""Reads images in one folder per class as table rows: uint8 [channels, height, width] and the folder's name.

Images are decoded by native code, in a child process with limits (pixels.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from maas_ray import confined
from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import ConfinedError, DataError

COLUMN = "image"
MAX_FILE_BYTES = 1 << 28
MAX_TABLE_BYTES = 1 << 32
_AT_ONCE = 256
_AT_ONCE_BYTES = 1 << 26
_LIMITS = confined.Limits(wall_s=600, cpu_s=300, memory_bytes=1 << 30)


def image_shape(spec: DataSpec, system: Any, path: str) -> tuple[int, int, int]:
    """Channels, height and width of every row: from the spec, the others from the image at `path`.

    Raises:
        DataError: it cannot be read as an image.
    """
    own = spec.image
    if own.channels and own.height and own.width:
        return own.channels, own.height, own.width
    try:
        found = _call("look", {"paths": [path]}, [_content(system, path)]).payload
    except ConfinedError as error:
        raise _unreadable(path, error) from error
    return own.channels or found["channels"], own.height or found["height"], own.width or found["width"]


def read_images(spec: DataSpec, system: Any, paths: Sequence[str], shape: tuple[int, ...]) -> pa.Table:
    """Decodes images; scales those of other sizes (bilinear) and converts those with other channels.

    Args:
        spec: contains the name of the target.
        system: pyarrow's filesystem.
        paths: paths of the files, each in the folder of its class.
        shape: channels, height and width.

    Raises:
        DataError: a file cannot be read as an image, or all images together are too large.
    """
    row_bytes = int(np.prod(shape))
    if row_bytes * len(paths) > MAX_TABLE_BYTES:
        raise DataError(
            f"{len(paths)} images of {shape[1]} x {shape[2]} pixels take more than the limit of {MAX_TABLE_BYTES} "
            "bytes; set data.image.height and data.image.width to a smaller size"
        )
    rows = np.empty((len(paths), *shape), dtype=np.uint8)
    at_once = max(1, min(_AT_ONCE, _AT_ONCE_BYTES // max(1, row_bytes)))
    for start in range(0, len(paths), at_once):
        part = list(paths[start : start + at_once])
        files = [_content(system, path) for path in part]
        rows[start : start + len(part)] = _decode(part, files, shape)
    field, images = tensor_field(COLUMN, rows)
    labels = pa.array([path.rsplit("/", 2)[-2] for path in paths], pa.string())
    return pa.table([images, labels], schema=pa.schema([field, pa.field(spec.target, pa.string())]))


def _decode(paths: Sequence[str], files: Sequence[bytes], shape: tuple[int, ...]) -> Any:
    payload = {"paths": list(paths), "shape": list(shape)}
    try:
        pixels = _call("decode", payload, files).blobs[0]
    except ConfinedError as error:
        if len(paths) == 1:
            raise _unreadable(paths[0], error) from error
        # One of the images failed; decoding each by itself shows which one.
        return [_decode([path], [file], shape)[0] for path, file in zip(paths, files, strict=True)]
    return np.frombuffer(pixels, dtype=np.uint8).reshape(len(paths), *shape)


def _call(function: str, payload: dict[str, Any], files: Sequence[bytes]) -> confined.Result:
    paths = payload["paths"]
    what = paths[0] if len(paths) == 1 else f"one of {len(paths)} images from {paths[0]} on"
    return confined.call(f"maas_ray.data.sources.pixels:{function}", payload, files, _LIMITS, what=what)


def _content(system: Any, path: str) -> bytes:
    try:
        with system.open_input_file(path) as file:
            if file.size() > MAX_FILE_BYTES:
                raise DataError(
                    f"{path} has {file.size()} bytes; the limit for an image is {MAX_FILE_BYTES} bytes; remove or "
                    "shrink it"
                )
            content: bytes = file.read()
    except OSError as error:
        raise _unreadable(path, error) from error
    return content


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"cannot read {path} as an image: {error}; remove it")
