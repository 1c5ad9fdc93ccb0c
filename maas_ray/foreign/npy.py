"""NumPy files against their own size: a header of a hundred bytes may promise an array of any size. Unpickles nothing."""

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maas_ray.errors import DataError

_ERRORS = (ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError, OSError, EOFError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(where: str, data: bytes) -> NDArray[Any]:
    """The array of a `.npy` file.

    Args:
        where: names it in messages.
        data: the file.

    Raises:
        DataError: not such a file, Python objects or records inside, or fewer bytes than its shape and type ask for.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise DataError(f"{where} is a NumPy file of version {version}, which holds records; save plain numbers")
        shape, _, dtype = _HEADERS[version](file)
        _check(where, shape, dtype, len(data) - file.tell())
        file.seek(0)
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    except _ERRORS as error:
        raise DataError(f"{where} is not a NumPy file that can be read: {_first_line(error)}") from error
    return array


def read_npz(where: str, data: bytes, max_bytes: int) -> Mapping[str, NDArray[Any]]:
    """The arrays of a `.npz` file, by their names.

    Args:
        where: names it in messages.
        data: the file.
        max_bytes: most bytes that its members may have once they are decompressed.

    Raises:
        DataError: not such a file, or larger; or a member is no array that `read_npy` takes.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            left = max_bytes
            for member in members:
                left -= member.file_size  # `ZipFile.read` gives no byte more than that
                if left < 0:
                    raise DataError(
                        f"{where} has {len(data)} bytes and becomes more than {max_bytes} when it is decompressed; "
                        "raise data.max_expansion if that is meant"
                    )
            for member in members:
                name = member.filename.removesuffix(".npy")
                arrays[name] = read_npy(f"array {name[:100]!r} of {where}", archive.read(member))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, *_ERRORS) as error:
        raise DataError(f"{where} is not a NumPy file that can be read: {_first_line(error)}") from error
    return arrays


def _check(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], num_bytes: int) -> None:
    if dtype.hasobject or dtype.fields is not None or dtype.itemsize == 0:
        raise DataError(
            f"{where} cannot be read: it holds {str(dtype)[:100]}, and only plain numbers and texts are read"
        )
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > num_bytes:
        raise DataError(
            f"{where} says that it holds {str(shape)[:100]} values of {dtype}, and has {num_bytes} bytes for them; it is "
            "cut off or damaged"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
