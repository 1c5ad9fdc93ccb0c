"""JSON tensors: conversion to and from arrays, as defined by the Open Inference Protocol v2. Independent of models.

Every check comes before the allocation that it protects, and names the input, the value, the limit and the way out.
NaN and infinity have no literal in JSON (RFC 8259): a null represents a missing value if the signature allows it,
and a NaN or an infinity in a response is written as null.
"""

import reprlib
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import TensorSpec
from maas_ray.errors import BadRequest

BINARY_ONLY = frozenset({"FP16", "BF16"})
"""Datatypes without a JSON form in the protocol."""

MAX_STRINGS = 1 << 20
"""Maximum elements of a BYTES input: each takes about 0.5 microseconds and 60 bytes, however short it is."""
_FLOATS = frozenset({"FP32", "FP64"})


def check_shape(spec: TensorSpec, shape: Any) -> tuple[int, ...]:
    """Returns the declared shape if it is valid for this input.

    Raises:
        BadRequest: not a list of non-negative integers, or its rank or a size is not the signature's.
    """
    if type(shape) is list and len(shape) != len(spec.shape):
        raise BadRequest(
            f"input {spec.name!r}: shape {short(shape)} does not match the model's {list(spec.shape)}: it has "
            f"{len(shape)} dimensions instead of {len(spec.shape)}"
        )
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise BadRequest(f"input {spec.name!r}: shape {short(shape)} is not a list of non-negative integers")
    if len(shape) != len(spec.shape) or any(
        want not in (-1, size) for want, size in zip(spec.shape, shape, strict=True)
    ):
        raise BadRequest(
            f"input {spec.name!r}: shape {short(shape)} does not match the model's {list(spec.shape)} (-1 is variable)"
        )
    if spec.datatype == "BYTES" and prod(shape) > MAX_STRINGS:
        raise BadRequest(
            f"input {spec.name!r}: shape {short(shape)} has more than {MAX_STRINGS} strings; send fewer rows per request"
        )
    return tuple(shape)


def read_json(spec: TensorSpec, shape: tuple[int, ...], data: Any, *, may_hold_bool: bool = True) -> Array:
    """Returns a tensor from the `data` of a request, flat or nested, in row-major order.

    Args:
        spec: input of the signature.
        shape: declared and validated shape.
        data: parsed JSON.
        may_hold_bool: whether the numbers may contain true or false; False skips a check of each.

    Returns:
        Array of `shape` and the signature's dtype; BYTES as objects of `str`.

    Raises:
        BadRequest: wrong number of elements, wrong nesting, wrong kind of value, out of the datatype's range,
            or a null where none is allowed.
    """
    if type(data) is not list:
        raise BadRequest(
            f"input {spec.name!r}: data is missing or not a list; send the values as a flat or nested list"
        )
    if spec.datatype in BINARY_ONLY:
        raise BadRequest(
            f"input {spec.name!r}: {spec.datatype} has no JSON form in the protocol; send it as binary data"
        )
    if data and type(data[0]) is list:
        data = list(_flatten(spec, shape, data))
    count = prod(shape)
    if len(data) != count:
        raise BadRequest(
            f"input {spec.name!r}: data has {len(data)} elements, shape {list(shape)} needs {short(count)}"
        )
    if spec.datatype == "BYTES":
        return _read_strings(spec, data).reshape(shape)
    if spec.datatype == "BOOL":
        return _read_bools(spec, data).reshape(shape)
    return _read_numbers(spec, data, may_hold_bool).reshape(shape)


def write_json(array: Array) -> Any:
    """Returns the flat row-major `data` of a response, as orjson can write it; NaN and infinity become null."""
    if array.dtype == object:
        return array.ravel().tolist()
    return array.ravel()


def _flatten(spec: TensorSpec, shape: tuple[int, ...], data: Any, depth: int = 0) -> Iterator[Any]:
    if type(data) is not list:
        raise BadRequest(
            f"input {spec.name!r}: data is nested {depth} levels deep somewhere, shape {list(shape)} has {len(shape)}"
        )
    if depth >= len(shape) or len(data) != shape[depth]:
        raise BadRequest(
            f"input {spec.name!r}: a list of {len(data)} elements at nesting depth {depth} does not match the declared "
            f"shape {list(shape)}; send a flat list, or one nested exactly as the shape"
        )
    if depth == len(shape) - 1:
        yield from data
    else:
        for inner in data:
            yield from _flatten(spec, shape, inner, depth + 1)


def _read_strings(spec: TensorSpec, data: list[Any]) -> Array:
    kinds = set(map(type, data))
    if type(None) in kinds and spec.nullable:
        data = ["" if value is None else value for value in data]
        kinds.discard(type(None))
    if kinds - {str}:
        raise _misfit(spec, data, lambda value: type(value) is not str, "a string")
    array = np.empty(len(data), dtype=object)
    array[:] = data
    return array


def _read_bools(spec: TensorSpec, data: list[Any]) -> Array:
    # Some clients have one type for all numbers: 1, 1.0, 0 and 0.0 have their usual meaning.
    if spec.nullable and None in data:  # a column of booleans, which is FP32 in the graph
        if not all(value is None or _is_bool(value) for value in data):
            raise _misfit(spec, data, lambda value: value is not None and not _is_bool(value), "true, false or null")
        return np.array([np.nan if value is None else value for value in data], dtype=np.float32)
    if set(map(type, data)) - {bool} and not all(map(_is_bool, data)):
        raise _misfit(spec, data, lambda value: not _is_bool(value), "true or false")
    return np.array(data, dtype=np.bool_)


def _is_bool(value: Any) -> bool:
    return type(value) in (bool, int, float) and (value == 0 or value == 1)


def _read_numbers(spec: TensorSpec, data: list[Any], may_hold_bool: bool) -> Array:
    if not data:
        return np.empty(0, dtype=NUMPY[spec.datatype])
    if spec.null_value is not None and None in data:
        data = [spec.null_value if value is None else value for value in data]
    if may_hold_bool and bool in set(map(type, data)):
        if spec.boolean:
            return _read_bools(spec, data).astype(NUMPY[spec.datatype])
        raise _misfit(spec, data, lambda value: type(value) is bool, "a number")
    try:
        raw = np.array(data)
    except (ValueError, OverflowError):
        raw = np.empty(0, dtype=object)  # a list among the numbers: reported below
    if raw.ndim != 1:  # lists of equal lengths in place of numbers
        raise _misfit(spec, data, lambda value: type(value) is list, "a number")
    is_float = spec.datatype in _FLOATS
    if raw.dtype.kind not in ("iuf" if is_float else "iu"):
        return _read_odd_numbers(spec, data)
    return _fit(spec, data, raw)


def _read_odd_numbers(spec: TensorSpec, data: list[Any]) -> Array:
    """Reads what numpy does not convert to numbers in one step: nulls, integers beyond 64 bits, wrong values."""
    if spec.datatype not in _FLOATS:
        if None in data and spec.nullable:
            raise BadRequest(
                f"input {spec.name!r}: element {data.index(None)} is null, but {spec.datatype} has no missing value"
            )
        if set(map(type, data)) - {int} and not all(map(_is_integer, data)):
            raise _misfit(spec, data, lambda value: not _is_integer(value), "an integer")
        # Integers without a common 64-bit type, such as 0 and 2**64 - 1: numpy has converted them to floats or objects.
        return _fit(spec, data, np.array([int(value) for value in data], dtype=object)).astype(NUMPY[spec.datatype])
    allowed = {int, float, type(None)} if spec.nullable else {int, float}
    if set(map(type, data)) - allowed:
        raise _misfit(spec, data, lambda value: type(value) not in allowed, "a number")
    missing = np.array([value is None for value in data])
    return np.where(
        missing, np.nan, _fit(spec, data, np.array([0.0 if value is None else value for value in data], np.float64))
    ).astype(NUMPY[spec.datatype])


def _is_integer(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())


def _fit(spec: TensorSpec, data: list[Any], raw: Array) -> Array:
    """Converts values to the signature's dtype, and refuses those out of its range."""
    dtype = NUMPY[spec.datatype]
    if spec.datatype in _FLOATS:
        with np.errstate(over="ignore"):
            # Integers are converted by FP64 as well, as on the fast path: the last bit must not depend on the path.
            array = raw.astype(np.float64).astype(dtype)
        fits = np.isfinite(array)
    else:
        bounds = np.iinfo(dtype)  # type: ignore[type-var]
        fits = ((raw >= bounds.min) & (raw <= bounds.max)).astype(np.bool_)  # type: ignore[operator]
        array = raw.astype(dtype) if raw.dtype != object or fits.all() else raw
    if not fits.all():
        index = int(np.argmin(fits))
        raise BadRequest(
            f"input {spec.name!r}: element {index} is {short(data[index])}, out of range for {spec.datatype}"
        )
    return array


def _misfit(spec: TensorSpec, data: list[Any], is_wrong: Any, expected: str) -> BadRequest:
    index = next((index for index, value in enumerate(data) if is_wrong(value)), 0)
    value = data[index]
    if value is None:
        return BadRequest(f"input {spec.name!r}: element {index} is null, and this input has no missing values")
    return BadRequest(f"input {spec.name!r} is {spec.datatype}: element {index} is {short(value)}, not {expected}")


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxstring, _REPR.maxother = 2, 8, 60, 60


def short(value: Any) -> str:
    """Returns a value of a request for an error message, limited in work and length."""
    return _REPR.repr(value)
