"""How much a file may become: a few bytes, compressed or encoded, can stand for more than any memory. Opens nothing."""

import io
from collections.abc import Sequence
from typing import Any

from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError

SMALL_BYTES = 1 << 26
"""Whatever the file, it may become this much."""
MAX_COLUMNS = 10_000
"""More are one column of vectors: a fixed-size list, or an array in a NumPy file."""


def allowed_bytes(spec: DataSpec, size: int) -> int:
    """Bytes that a file of `size` bytes may become in memory."""
    return max(SMALL_BYTES, int(spec.max_expansion * size))


def too_much(spec: DataSpec, path: str, size: int) -> DataError:
    """The refusal of a file that becomes more."""
    return DataError(
        f"{path} has {size} bytes and becomes more than {allowed_bytes(spec, size)} when it is read, more than "
        f"{spec.max_expansion:g} times as many; raise data.max_expansion if that is meant"
    )


def refuse_many_columns(names: Sequence[str], where: str) -> None:
    """Raises `DataError` for a table of more than `MAX_COLUMNS` columns."""
    if len(names) > MAX_COLUMNS:
        raise too_many_columns(where, str(len(names)))


def too_many_columns(where: str, number: str) -> DataError:
    """The refusal of a table with so many columns."""
    return DataError(
        f"{where} has {number} columns; the limit is {MAX_COLUMNS}: store them as one column of vectors (a fixed-size list "
        "in parquet, an array in a NumPy file)"
    )


class BoundedStream(io.RawIOBase):
    """A decompressed stream that ends with an error once it has given more than its file may become.

    Args:
        stream: pyarrow's.
        spec: names the bound.
        path: of the file, for the message.
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
        """At most `size` bytes; all that is left where it is negative."""
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        data: bytes = self._stream.read(wanted)
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        return data

    def close(self) -> None:
        """Closes the stream behind it too."""
        if not self.closed:
            self._stream.close()
        super().close()
