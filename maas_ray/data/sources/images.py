"""Reads images in one folder per class as table rows: uint8 [channels, height, width] and the folder's name.

Images are decoded by native code, in a child process with limits (decoding/pixels.py).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from maas_ray import confined
from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.sources.files import filesystem
from maas_ray.data.sources.image_folders import FOLDER, SPLIT_FOLDERS, ImageFolder, with_folders
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.features import Column
from maas_ray.decoding.pixels import unreadable
from maas_ray.decoding.spec import ImageEncoding
from maas_ray.errors import ConfinedError, DataError

COLUMN = "image"
MAX_FILE_BYTES = 1 << 28
MAX_TABLE_BYTES = 1 << 32
_AT_ONCE = 256
_AT_ONCE_BYTES = 1 << 26
_HEAD_BYTES = 1 << 18
"""First bytes of a file that contain the header of nearly every image; of the others, the whole file is read."""
_READERS = 16
_LIMITS = confined.Limits(wall_s=600, cpu_s=300, memory_bytes=1 << 30)


@dataclass(frozen=True)
class ImageSurvey:
    """What the headers of all images say."""

    shape: tuple[int, int, int]
    """Channels, height and width of every row."""
    num_gray: int
    num_color: int
    num_scaled: int
    """Images of another size than the rows."""


def settle_images(spec: DataSpec, found: ImageFolder) -> tuple[DataSpec, dict[str, Any]]:
    """The spec with the shape of the rows and the split that the folders give; and what to report about the images.

    Args:
        spec: the data specification.
        found: the images that its URI names.

    Raises:
        DataError: a file cannot be read as an image, or the spec divides splits again.
    """
    spec, report = with_folders(spec, found), found.report()
    own = spec.image
    if not (own.channels and own.height and own.width):
        system, _ = filesystem(spec, spec.uri)
        survey = survey_images(spec, system, [file.path for file in found.files])
        channels, height, width = survey.shape
        report |= {"gray": survey.num_gray, "color": survey.num_color, "scaled": survey.num_scaled}
        size = own.model_copy(update={"channels": channels, "height": height, "width": width})
        spec = spec.model_copy(update={"image": size})
    return spec, {"images": report}


def mark_images(spec: DataSpec, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """The fitted columns of images, with the way in which they were decoded."""
    encoding = ImageEncoding(background=spec.image.background)
    return tuple(
        column.model_copy(update={"image": encoding}) if column.kind == "tensor" and column.name == COLUMN else column
        for column in columns
    )


def survey_images(spec: DataSpec, system: Any, paths: Sequence[str]) -> ImageSurvey:
    """Reads the header of every image.

    Channels that the spec leaves open are 3 if any image has colors, else 1; its height and width are those of the
    first image.

    Args:
        spec: contains the shape, or a part of it.
        system: pyarrow's filesystem.
        paths: paths of the files, at least one.

    Raises:
        DataError: a file cannot be read as an image.
    """
    own = spec.image
    first: tuple[int, int] | None = None
    num_color = num_scaled = 0
    for is_color, height, width in _headers(system, paths):
        if first is None:
            first = own.height or height, own.width or width
        num_color += is_color
        num_scaled += (height, width) != first
    height, width = first or (1, 1)
    channels = own.channels or (3 if num_color else 1)
    return ImageSurvey((channels, height, width), len(paths) - num_color, num_color, num_scaled)


def image_shape(spec: DataSpec, system: Any, paths: Sequence[str]) -> tuple[int, int, int]:
    """Channels, height and width of every row; see `survey_images`.

    Raises:
        DataError: a file cannot be read as an image.
    """
    own = spec.image
    if own.channels and own.height and own.width:
        return own.channels, own.height, own.width
    return survey_images(spec, system, paths).shape


def read_images(spec: DataSpec, system: Any, paths: Sequence[str], shape: tuple[int, ...]) -> pa.Table:
    """Decodes images; scales those of other sizes (bilinear) and converts those with other channels.

    Args:
        spec: contains the name of the target and the background.
        system: pyarrow's filesystem.
        paths: paths of the files, each in the folder of its class, which is in the folder of its split if the spec
            names `FOLDER` as the split column.
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
        rows[start : start + len(part)] = decode_files(part, files, shape, spec.image.background)
    field, images = tensor_field(COLUMN, rows)
    columns = {COLUMN: images, spec.target: pa.array([path.rsplit("/", 2)[-2] for path in paths], pa.string())}
    if spec.split.column == FOLDER:
        columns[FOLDER] = pa.array([SPLIT_FOLDERS[path.rsplit("/", 3)[-3].lower()] for path in paths], pa.string())
    fields = [field, *(pa.field(name, pa.string()) for name in list(columns)[1:])]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def decode_files(paths: Sequence[str], files: Sequence[bytes], shape: Sequence[int], background: int) -> Any:
    """The pixels of image files, uint8 [N, channels, height, width].

    Raises:
        DataError: one cannot be read as an image.
    """
    payload = {"paths": list(paths), "shape": list(shape), "background": background}
    try:
        pixels = _call("decode", payload, files).blobs[0]
    except ConfinedError as error:
        if len(paths) == 1:
            raise unreadable(paths[0], error) from error
        # One of the images failed; decoding each by itself shows which one.
        return [decode_files([path], [file], shape, background)[0] for path, file in zip(paths, files, strict=True)]
    return np.frombuffer(pixels, dtype=np.uint8).reshape(len(paths), *shape)


def _headers(system: Any, paths: Sequence[str]) -> Iterator[tuple[bool, int, int]]:
    """Whether each image has colors, its height and its width."""
    with ThreadPoolExecutor(_READERS) as threads:
        for start in range(0, len(paths), _AT_ONCE):
            part = paths[start : start + _AT_ONCE]
            heads = list(threads.map(lambda path: _content(system, path, _HEAD_BYTES), part))
            yield from _look(system, part, heads)


def _look(system: Any, paths: Sequence[str], heads: Sequence[bytes]) -> list[tuple[bool, int, int]]:
    try:
        return [tuple(found) for found in _call("look", {"paths": list(paths)}, heads).payload["images"]]
    except (ConfinedError, DataError) as error:
        if len(paths) > 1:
            # One of the headers is long, or damaged; looking at each by itself shows which one.
            pairs = zip(paths, heads, strict=True)
            return [found for path, head in pairs for found in _look(system, [path], [head])]
        if len(heads[0]) == _HEAD_BYTES:
            return _look(system, paths, [_content(system, paths[0])])
        if isinstance(error, DataError):
            raise
        raise unreadable(paths[0], error) from error


def _call(function: str, payload: dict[str, Any], files: Sequence[bytes]) -> confined.Result:
    paths = payload["paths"]
    what = paths[0] if len(paths) == 1 else f"one of {len(paths)} images from {paths[0]} on"
    return confined.call(f"maas_ray.decoding.pixels:{function}", payload, files, _LIMITS, what=what)


def _content(system: Any, path: str, num_bytes: int | None = None) -> bytes:
    """The file, or its first bytes."""
    try:
        with system.open_input_file(path) as file:
            if file.size() > MAX_FILE_BYTES:
                raise DataError(
                    f"{path} has {file.size()} bytes; the limit for an image is {MAX_FILE_BYTES} bytes; remove or "
                    "shrink it"
                )
            content: bytes = file.read(num_bytes)
    except OSError as error:
        raise unreadable(path, error) from error
    return content
