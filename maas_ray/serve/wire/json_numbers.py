"""JSON numbers to arrays without a check per number: the fast path of parsing. Never reports errors.

Every function here returns None for data that is not clearly valid; `tensors.read_json`, which checks each value, then
reads the same data again and either accepts it or reports the error. So both paths report the same errors by
construction, and the tests compare their values.
"""

import struct
from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import Any, Literal

import numpy as np
import orjson
import simdjson

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Datatype

MAX_KEPT_BYTES = 1 << 20
"""Larger documents get their own parser: a parser keeps buffers of about ten times the largest document it has read."""

_CODES: dict[Datatype, str] = {
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "FP32": "f", "FP64": "d",
}  # fmt: skip
_WIDE: dict[str, Datatype] = {"d": "FP64", "i": "INT64", "u": "UINT64"}
_MAX_PACKERS = 1024

_MAX_FINDS = 16
_FEW_BYTES = 512
"""Up to this size Python's own numbers are faster than numpy's calls (10 numbers: 2.0 against 4.6 microseconds)."""

_PARSER = simdjson.Parser()


def parse(text: bytes) -> Any:
    """Returns the document as simdjson's proxies, or None if it is not JSON; drop them before the next call."""
    parser = _PARSER if len(text) <= MAX_KEPT_BYTES else simdjson.Parser()
    try:
        return parser.parse(text)
    except (ValueError, RuntimeError, MemoryError):  # RuntimeError also while a proxy is still referenced
        return None


def fields(value: Any, known: frozenset[str]) -> dict[str, Any] | None:
    """Returns the fields of simdjson's object, or None if it is not an object, or has a repeated or unknown field."""
    if type(value) is not simdjson.Object:
        return None
    names = list(value)
    # simdjson scans all fields for each access: only few may be read.
    if len(names) > len(known) or len(set(names)) < len(names) or not known.issuperset(names):
        return None
    return {name: value[name] for name in names}


def is_list(value: Any) -> bool:
    """Whether this is simdjson's array."""
    return type(value) is simdjson.Array


def plain(value: Any) -> Any:
    """Returns the value with Python's own types."""
    if type(value) is simdjson.Array:
        return value.as_list()
    return value.as_dict() if type(value) is simdjson.Object else value


class Numbers:
    """Reads JSON numbers of one datatype.

    Args:
        datatype: datatype of the input; not every one has numbers, see `can_read`.
    """

    __slots__ = ("_code", "_dtype", "_high", "_kind", "_low", "_packers", "_wide")

    def __init__(self, datatype: Datatype) -> None:
        self._dtype = NUMPY[datatype]
        self._code = f"<%d{_CODES[datatype]}"
        self._packers: dict[int, Any] = {}
        self._kind: Literal["d", "i", "u"] = "d"
        bounds: Any = np.finfo(self._dtype) if self._dtype.kind == "f" else np.iinfo(self._dtype)
        self._low, self._high = float(bounds.min), float(bounds.max)  # exact for all types narrower than 64 bits
        if self._dtype.kind in "iu":
            self._kind = "u" if datatype == "UINT64" else "i"
        self._wide = NUMPY[_WIDE[self._kind]]

    @staticmethod
    def can_read(datatype: Datatype) -> bool:
        """Whether this datatype is represented by JSON numbers."""
        return datatype in _CODES

    def fixed(self, shape: tuple[int, ...]) -> "FixedNumbers":
        """Returns a reader of tensors of one shape."""
        return FixedNumbers(self, shape, self._dtype, struct.Struct(self._code % prod(shape)).pack)

    def from_list(self, data: Any, shape: tuple[int, ...]) -> Array | None:
        """Converts Python's numbers, flat or nested; they must not contain a bool, which would count as a number."""
        if type(data) is not list:
            return None
        if data and type(data[0]) is list:
            data = _flatten(data, shape)
            if data is None:
                return None
        count = prod(shape)
        if len(data) != count or not count:
            return None
        pack = self._packers.get(count)
        if pack is None:
            if len(self._packers) >= _MAX_PACKERS:
                self._packers.clear()
            pack = self._packers[count] = struct.Struct(self._code % count).pack
        try:
            return np.ndarray(shape, self._dtype, pack(*data))
        except (struct.error, OverflowError):
            return None

    def from_proxy(self, data: Any, shape: tuple[int, ...]) -> Array | None:
        """Converts simdjson's array, flat or nested, without a Python object per number.

        simdjson flattens everything in the array: the caller must ensure that it contains no more lists than the shape
        defines, see `num_lists`.
        """
        if type(data) is not simdjson.Array or not _fits(data, shape):
            return None
        return self._convert(data, shape)

    def from_text(self, text: bytes, shape: tuple[int, ...]) -> Array | None:
        """Converts the JSON text of the data."""
        data = parse(text)
        if type(data) is not simdjson.Array:
            return None
        is_nested = text.find(b"[", 1) > 0
        if is_nested and (not _fits(data, shape) or not has_lists(text, num_lists(data, shape))):
            return None
        return self._convert(data, shape)

    def from_flat_text(self, text: bytes) -> Array | None:
        """Converts the JSON text of a flat list, in any thread; it must not contain true or false."""
        try:
            data = simdjson.Parser().parse(text)
        except (ValueError, RuntimeError, MemoryError):
            return None
        return self._convert(data, None) if type(data) is simdjson.Array else None

    def _convert(self, data: simdjson.Array, shape: tuple[int, ...] | None) -> Array | None:
        try:
            buffer = data.as_buffer(of_type=self._kind)
        except (TypeError, ValueError):  # a value that is not a number, not an integer, or beyond 64 bits
            return None
        wide = np.frombuffer(buffer, self._wide)
        if shape is None:
            shape = wide.shape
        if wide.size != prod(shape) or not wide.size:  # len(data) is limited to 2**24 - 1
            return None
        if self._wide is not self._dtype:
            # Before, not after: numpy would warn of an overflow, and its errstate costs more than both passes. By
            # index, because min and max take four times as long for a few numbers.
            if wide.item(wide.argmin()) < self._low or wide.item(wide.argmax()) > self._high:
                return None
            wide = wide.astype(self._dtype)
        return wide.reshape(shape)


class FixedNumbers:
    """Reads the JSON of tensors of one shape.

    Args:
        numbers: reader of the input.
        shape: shape of the tensors.
        dtype: dtype of the tensors.
        pack: converts as many Python numbers as the tensor has elements to its bytes.
    """

    __slots__ = ("_dtype", "_from_text", "_pack", "_shape")

    def __init__(
        self, numbers: Numbers, shape: tuple[int, ...], dtype: "np.dtype[Any]", pack: Callable[..., bytes]
    ) -> None:
        self._from_text = numbers.from_text
        self._shape = shape
        self._dtype = dtype
        self._pack = pack

    def read(self, text: bytes) -> Array | None:
        """Returns the tensor; None for data that is not clearly valid."""
        if len(text) <= _FEW_BYTES and b"t" not in text and b"f" not in text:  # true and false would count as numbers
            try:
                return np.ndarray(self._shape, self._dtype, self._pack(*orjson.loads(text)))
            except (struct.error, OverflowError, TypeError, orjson.JSONDecodeError):
                pass  # for example nested lists, which the other path reads
        return self._from_text(text, self._shape)


def num_lists(data: Any, shape: tuple[int, ...]) -> int:
    """Returns the number of lists in a tensor of this shape, flat or nested according to its first element."""
    if not len(data) or type(data[0]) is not simdjson.Array:
        return 1
    count, total = 1, 1
    for size in shape[:-1]:
        count *= size
        total += count
    return total


def has_lists(text: bytes, expected: int) -> bool:
    """Whether the text has exactly this many opening brackets; one in a string counts, so that the result is False."""
    if expected > _MAX_FINDS:
        return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("["))) == expected
    position = -1  # bytes.count checks single bytes, find many at once
    for _ in range(expected):
        position = text.find(b"[", position + 1)
        if position < 0:
            return False
    return text.find(b"[", position + 1) < 0


def _fits(data: Any, shape: tuple[int, ...]) -> bool:
    """Whether lists are flat or nested as in the shape; also False for a rare case, no elements."""
    if not len(data):
        return False
    if type(data[0]) is not simdjson.Array:
        return True
    if not shape:  # a scalar has no lists
        return False
    level: Sequence[Any] = (data,)
    for depth, size in enumerate(shape):
        if any(type(inner) is not simdjson.Array or len(inner) != size for inner in level):
            return False
        if depth < len(shape) - 1:
            level = list(chain.from_iterable(level))
    return True


def _flatten(data: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    if not shape or len(data) != shape[0]:
        return None
    for size in shape[1:]:
        for inner in data:
            if type(inner) is not list or len(inner) != size:
                return None
        data = list(chain.from_iterable(data))
    return data
