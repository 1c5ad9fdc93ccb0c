"""Columns as they were read to the three kinds that the library knows. Decides no cleaning and fits nothing.

A cast table has numeric columns as float32 (NaN is missing), categories as text ("" is missing) or, where every value
is an integer and none is missing, int64, and tensors as fixed-size lists of float32 or uint8. It has no nulls.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.arrays import tensor_field, tensor_shape, tensor_values
from maas_ray.errors import DataError

Kind = Literal["numeric", "categorical", "tensor"]
_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class CastColumn:
    """One column after the cast."""

    kind: Kind
    field: pa.Field
    values: pa.Array
    missing: NDArray[np.bool_]
    """[N]; includes what could not be converted. A tensor is missing if any of its elements is."""
    num_missing: int
    """Missing as it was read."""
    num_unconvertible: int
    """Present, but not convertible; elements, for a tensor."""


def cast_column(field: pa.Field, column: pa.ChunkedArray, to: str | None, is_typed: bool) -> CastColumn:
    """Casts one feature column.

    Args:
        field: its name, type and, for a tensor, shape.
        column: as it was read.
        to: `number`, `category` or None: numbers and booleans are numbers, text is a category.
        is_typed: False: the file format has no types (csv), so that text is a number if every present value reads
            as one.

    Raises:
        DataError: a type that no kind fits, or a cast that makes no sense.
    """
    name = field.name
    if tensor_shape(field) is not None:
        if to is not None:
            raise DataError(f"column {name!r} is a tensor and cannot be cast to {to}")
        return _tensor(field, column)
    column = decode_column(name, column)
    is_text = pa.types.is_string(column.type)
    if to == "category" or (is_text and to is None and is_typed):
        return _category(name, column)
    values, num_unconvertible = to_numbers(column)
    if is_text and to is None and (num_unconvertible or not len(column) - column.null_count):
        return _category(name, column)
    missing = np.isnan(values)
    num_missing = int(missing.sum()) - num_unconvertible
    return CastColumn(
        "numeric", pa.field(name, pa.float32()), pa.array(values), missing, num_missing, num_unconvertible
    )


def to_numbers(column: pa.ChunkedArray) -> tuple[NDArray[np.float32], int]:
    """Numbers, booleans or text to float32 [N], NaN where missing or not convertible, and how many were not.

    A number beyond float32 and an infinity are not convertible.
    """
    if pa.types.is_string(column.type):
        doubles, num_failed = _parse(column)
    else:
        doubles = column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        num_failed = 0
    values = _to_float32(doubles)
    infinite = np.isinf(values)
    values[infinite] = np.nan
    return values, num_failed + int(infinite.sum())


def to_text(name: str, column: pa.ChunkedArray) -> pa.Array:
    """Any scalar column to text, "" where missing; whole numbers are written without a fraction."""
    column = decode_column(name, column)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(column, pc.floor(column))).as_py() and pc.all(pc.less(pc.abs(column), 2.0**53)).as_py()
        column = column.cast(pa.int64()) if whole else column
    text = column.cast(pa.string())
    return pc.fill_null(text, "").combine_chunks()


def decode_column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries, decimals and the variants of text to plain ones; refuses what is neither number nor text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column
    raise DataError(
        f"column {name!r} has type {kind}, which is neither a number, text nor a tensor; "
        f"convert it to one of them, or leave it out with cleaning.drop"
    )


def _parse(column: pa.ChunkedArray) -> tuple[NDArray[np.float64], int]:
    trimmed = pc.utf8_trim_whitespace(column)
    trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    try:
        return trimmed.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64), 0
    except pa.ArrowInvalid:
        encoded = pc.dictionary_encode(trimmed.combine_chunks())
    parsed = [_parse_one(text) for text in encoded.dictionary.to_pylist()]
    table = np.array([np.nan if value is None else value for value in parsed] + [np.nan])
    failed = np.array([value is None for value in parsed] + [False])
    indices = pc.fill_null(encoded.indices, len(parsed)).to_numpy(zero_copy_only=False)
    return table[indices], int(failed[indices].sum())


def _parse_one(text: str) -> float | None:
    if text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _category(name: str, column: pa.ChunkedArray) -> CastColumn:
    text = to_text(name, column)
    missing = np.asarray(pc.equal(text, "").to_numpy(zero_copy_only=False))
    integers = None if missing.any() else _integers(text)
    values = text if integers is None else integers
    return CastColumn("categorical", pa.field(name, values.type), values, missing, int(missing.sum()), 0)


def _integers(text: pa.Array) -> pa.Array | None:
    """The integers that all of `text` writes in the usual way, or None (`007` is text)."""
    try:
        integers = text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return integers if integers.cast(pa.string()).equals(text) else None


def _tensor(field: pa.Field, column: pa.ChunkedArray) -> CastColumn:
    kind = field.type.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"column {field.name!r} is a list of {kind}; a tensor must hold numbers")
    if column.null_count:
        raise DataError(f"column {field.name!r} has {column.null_count} rows without a tensor; remove these rows")
    raw: NDArray[Any] = tensor_values(field, column)
    values = raw if raw.dtype == np.uint8 else _to_float32(raw)
    num_missing = int(np.isnan(values).reshape(len(values), -1).any(axis=1).sum())
    infinite = np.isinf(values)
    if infinite.any():
        values = np.where(infinite, np.float32(np.nan), values)
    missing = np.asarray(np.isnan(values).reshape(len(values), -1).any(axis=1))
    new_field, array = tensor_field(field.name, values)
    return CastColumn("tensor", new_field, array, missing, num_missing, int(infinite.sum()))


def _to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """What is beyond float32 becomes an infinity, which the callers treat as not convertible."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
