"""Reads untrusted NumPy files: checks that their data has the size of their shape and type. Unpickles nothing."""

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
    """Reads the array of a `.npy` file.

    Args:
        where: name of the file for messages.
        data: content of the file.

    Raises:
        DataError: it is not such a file, contains Python objects or records, or has too few bytes for its shape and
            type.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise DataError(f"{where} is a NumPy file of version {version}, which contains records; save plain numbers")
        shape, _, dtype = _HEADERS[version](file)
        _check(where, shape, dtype, len(data) - file.tell())
        file.seek(0)
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    except _ERRORS as error:
        raise DataError(f"cannot read {where} as a NumPy file: {_first_line(error)}") from error
    return array


def read_npz(where: str, data: bytes, max_bytes: int) -> Mapping[str, NDArray[Any]]:
    """Reads the arrays of a `.npz` file, by name.

    Args:
        where: name of the file for messages.
        data: content of the file.
        max_bytes: maximum bytes of its members after decompression.

    Raises:
        DataError: it is not such a file, is larger, or contains a member that `read_npy` rejects.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            left = max_bytes
            for member in members:
                left -= member.file_size  # `ZipFile.read` returns at most this many bytes
                if left < 0:
                    raise DataError(
                        f"{where} has {len(data)} bytes and expands to more than {max_bytes} bytes when it is "
                        "decompressed; raise data.max_expansion if you trust the file"
                    )
            for member in members:
                name = member.filename.removesuffix(".npy")
                arrays[name] = read_npy(f"array {name[:100]!r} of {where}", archive.read(member))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, *_ERRORS) as error:
        raise DataError(f"cannot read {where} as a NumPy file: {_first_line(error)}") from error
    return arrays


def _check(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], num_bytes: int) -> None:
    if dtype.hasobject or dtype.fields is not None or dtype.itemsize == 0:
        raise DataError(f"cannot read {where}: it contains {str(dtype)[:100]}; save plain numbers or strings")
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > num_bytes:
        raise DataError(
            f"{where} declares the shape {str(shape)[:100]} and the type {dtype}, but has {num_bytes} bytes of data; "
            "it is truncated or damaged"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
