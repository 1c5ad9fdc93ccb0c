"""Limits on the decompressed size of files: a few compressed bytes can expand beyond any memory."""

import io
from collections.abc import Sequence
from typing import Any

from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError

SMALL_BYTES = 1 << 26
"""Size to which every file may expand."""
MAX_COLUMNS = 10_000
"""More columns belong in one column of vectors: a fixed-size list, or an array in a NumPy file."""


def allowed_bytes(spec: DataSpec, size: int) -> int:
    """Bytes in memory to which a file of `size` bytes may expand."""
    return max(SMALL_BYTES, int(spec.max_expansion * size))


def too_much(spec: DataSpec, path: str, size: int) -> DataError:
    """The error for a file that expands beyond its limit."""
    return DataError(
        f"{path} has {size} bytes and expands to more than {allowed_bytes(spec, size)} bytes when it is read; the "
        f"limit is {spec.max_expansion:g} times its size; raise data.max_expansion if you trust the file"
    )


def refuse_many_columns(names: Sequence[str], where: str) -> None:
    """Raises `DataError` for a table of more than `MAX_COLUMNS` columns."""
    if len(names) > MAX_COLUMNS:
        raise too_many_columns(where, str(len(names)))


def too_many_columns(where: str, number: str) -> DataError:
    """The error for a table with too many columns."""
    return DataError(
        f"{where} has {number} columns; the limit is {MAX_COLUMNS}: store them as one column of vectors (a fixed-size list "
        "in parquet, an array in a NumPy file)"
    )


class BoundedStream(io.RawIOBase):
    """A decompressed stream that raises an error once it has returned more bytes than its file may expand to.

    Args:
        stream: pyarrow's stream.
        spec: contains the limit.
        path: path of the file, for the message.
        size: bytes of the file.
    """

    def __init__(self, stream: Any, spec: DataSpec, path: str, size: int) -> None:
        self._stream = stream
        self._left = allowed_bytes(spec, size)
        self._error = too_much(spec, path, size)

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, or all remaining bytes if `size` is negative."""
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        data: bytes = self._stream.read(wanted)
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        return data

    def close(self) -> None:
        """Closes the underlying stream too."""
        if not self.closed:
            self._stream.close()
        super().close()
