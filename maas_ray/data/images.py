"""Images in folders, one folder per class, as rows of a table: uint8 [channels, height, width] and the folder's name."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.arrays import tensor_field
from maas_ray.data.spec import DataSpec
from maas_ray.errors import DataError

COLUMN = "image"
_MODES = {1: "L", 3: "RGB"}


def image_shape(spec: DataSpec, system: Any, path: str) -> tuple[int, int, int]:
    """Channels, height and width of every row: what the spec says, the rest as in the image at `path`.

    Raises:
        DataError: it is not an image that can be read.
    """
    own = spec.image
    if own.channels and own.height and own.width:
        return own.channels, own.height, own.width
    with _open(system, path) as image:
        channels = 1 if image.mode in ("1", "L", "I;16") else 3
        return own.channels or channels, own.height or image.height, own.width or image.width


def read_images(spec: DataSpec, system: Any, paths: Sequence[str], shape: tuple[int, ...]) -> pa.Table:
    """Decodes images; one of another size is scaled (bilinear), one of other colours converted.

    Args:
        spec: names the target.
        system: pyarrow's filesystem.
        paths: files, each in the folder of its class.
        shape: channels, height and width.

    Raises:
        DataError: a file is not an image that can be read.
    """
    rows = np.empty((len(paths), *shape), dtype=np.uint8)
    for row, path in zip(rows, paths, strict=True):
        row[:] = _decode(system, path, shape)
    field, images = tensor_field(COLUMN, rows)
    labels = pa.array([path.rsplit("/", 2)[-2] for path in paths], pa.string())
    return pa.table([images, labels], schema=pa.schema([field, pa.field(spec.target, pa.string())]))


def _decode(system: Any, path: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    from PIL import Image

    channels, height, width = shape
    with _open(system, path) as image:
        try:
            plain = image.convert(_MODES[channels])
            if plain.size != (width, height):
                plain = plain.resize((width, height), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's ways to say that a file is damaged
            raise DataError(f"{path} is not an image that can be read: {error}") from error
        return np.asarray(plain, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def _open(system: Any, path: str) -> Any:
    from PIL import Image  # late: only this source needs it

    try:
        with system.open_input_stream(path) as stream:
            return Image.open(io.BytesIO(stream.read()))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read: {error}; remove it") from error
