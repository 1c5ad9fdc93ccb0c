"""Casts raw columns to the three column kinds: numeric, categorical and tensor.

A cast table has numeric columns as float32 (NaN is missing), categories as text ("" is missing) or, where every value
is an integer and none is missing, int64, and tensors as fixed-size lists of float32 or uint8. It has no nulls.
The kind depends on the whole column, which need not be in memory: each chunk is surveyed, and the surveys are merged.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.sources.arrays import tensor_field, tensor_shape, tensor_values
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
    """[N]; includes values that could not be converted. A tensor is missing if any of its elements is."""
    num_missing: int
    """Values that were missing in the source."""
    num_unconvertible: int
    """Present, but not convertible; elements, for a tensor."""


@dataclass(frozen=True)
class Survey:
    """The properties of a chunk of a column that decide the kind of the whole column."""

    has_values: bool = False
    is_numbers: bool = True
    """Every text that is present reads as a number."""
    is_whole: bool = True
    """Every number that is present is whole and below 2**53."""
    is_integers: bool = True
    """No value is missing, and each is an integer written in the usual way (`007` is text)."""

    def merged(self, other: "Survey") -> "Survey":
        """The survey of both chunks together."""
        return Survey(
            self.has_values or other.has_values,
            self.is_numbers and other.is_numbers,
            self.is_whole and other.is_whole,
            self.is_integers and other.is_integers,
        )


@dataclass(frozen=True)
class Cast:
    """The target type of a column."""

    kind: Kind
    is_whole: bool = True
    """A category made of floating-point numbers is written without a fraction."""
    is_integer: bool = False
    """A category is int64."""


def cast_column(field: pa.Field, column: pa.ChunkedArray, to: str | None, is_typed: bool) -> CastColumn:
    """Casts one complete feature column.

    Args:
        field: name, type and, for a tensor, shape.
        column: raw values.
        to: `number`, `category` or None: numbers and booleans are numbers, text is a category.
        is_typed: False: the file format has no types (csv), so that text is a number if every present value reads
            as one.

    Raises:
        DataError: no kind fits the type, or the cast is impossible.
    """
    survey = survey_column(field, column, to) if needs_survey(field, to) else Survey()
    return apply_cast(field, column, choose_cast(field, survey, to, is_typed))


def needs_survey(field: pa.Field, to: str | None) -> bool:
    """Whether the kind depends on the values and not on the type alone."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    is_settled = is_number or pa.types.is_boolean(kind) or tensor_shape(field) is not None
    return to == "category" or not (is_settled or to == "number")


def survey_column(field: pa.Field, column: pa.ChunkedArray, to: str | None) -> Survey:
    """Surveys a chunk of a column.

    Raises:
        DataError: no kind fits the type.
    """
    if tensor_shape(field) is not None:
        return Survey()  # `choose_cast` reports a wrong cast
    column = decode_column(field.name, column)
    is_text = pa.types.is_string(column.type)
    is_numbers = not (is_text and to is None) or to_numbers(column)[1] == 0
    is_whole = not pa.types.is_floating(column.type) or are_whole(column)
    text = to_text(field.name, column, is_whole)
    is_integers = not pc.any(pc.equal(text, "")).as_py() and _integers(text) is not None
    return Survey(len(column) > column.null_count, is_numbers, is_whole, is_integers)


def choose_cast(field: pa.Field, survey: Survey, to: str | None, is_typed: bool) -> Cast:
    """The kind of a column, from the survey of all of it.

    Raises:
        DataError: the cast is impossible.
    """
    if tensor_shape(field) is not None:
        if to is not None:
            raise DataError(
                f"column {field.name!r} is a tensor and cannot be cast to {to}; remove "
                f"cleaning.columns.{field.name}.cast"
            )
        return Cast("tensor")
    is_text = needs_survey(field, None)
    looks_like_numbers = not is_typed and survey.is_numbers and survey.has_values
    if to == "category" or (is_text and to is None and not looks_like_numbers):
        return Cast("categorical", survey.is_whole, survey.is_integers and survey.is_whole)
    return Cast("numeric")


def apply_cast(field: pa.Field, column: pa.ChunkedArray, cast: Cast) -> CastColumn:
    """Casts a chunk of a column.

    Raises:
        DataError: no kind fits the type, or a whole tensor is missing.
    """
    if cast.kind == "tensor":
        return _tensor(field, column)
    column = decode_column(field.name, column)
    if cast.kind == "categorical":
        return _category(field.name, column, cast)
    values, num_unconvertible = to_numbers(column)
    missing = np.isnan(values)
    num_missing = int(missing.sum()) - num_unconvertible
    field = pa.field(field.name, pa.float32())
    return CastColumn("numeric", field, pa.array(values), missing, num_missing, num_unconvertible)


def to_numbers(column: pa.ChunkedArray) -> tuple[NDArray[np.float32], int]:
    """Converts numbers, booleans or text to float32 [N]; returns it and the number of values that are not convertible.

    Missing and not convertible values become NaN. A number beyond float32 and an infinity are not convertible.
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


def to_text(name: str, column: pa.ChunkedArray, is_whole: bool | None = None) -> pa.Array:
    """Converts any scalar column to text, "" where missing; whole numbers are written without a fraction.

    Args:
        name: name of the column.
        column: values of the column.
        is_whole: whether all numbers of the whole column are whole; None: `column` is the whole column.
    """
    column = decode_column(name, column)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        column = column.cast(pa.int64()) if (are_whole(column) if is_whole is None else is_whole) else column
    text = pc.fill_null(column.cast(pa.string()), "")
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def are_whole(column: pa.ChunkedArray) -> bool:
    """Whether all floating-point numbers that are present are whole and exact as int64."""
    column = pc.if_else(pc.is_nan(column), None, column)
    is_exact = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**53))
    return bool(pc.all(is_exact, min_count=0).as_py())


def decode_column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts dictionaries, decimals and the variants of text to plain types; rejects other types."""
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


def _category(name: str, column: pa.ChunkedArray, cast: Cast) -> CastColumn:
    text = to_text(name, column, cast.is_whole)
    missing = np.asarray(pc.equal(text, "").to_numpy(zero_copy_only=False))
    values = text.cast(pa.int64()) if cast.is_integer else text
    return CastColumn("categorical", pa.field(name, values.type), values, missing, int(missing.sum()), 0)


def _integers(text: pa.Array) -> pa.Array | None:
    """The integers in `text` if each is written in the usual way, else None (`007` is text)."""
    try:
        integers = text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return integers if integers.cast(pa.string()).equals(text) else None


def _tensor(field: pa.Field, column: pa.ChunkedArray) -> CastColumn:
    kind = field.type.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"column {field.name!r} is a list of {kind}; a tensor must contain numbers")
    if column.null_count:
        raise DataError(f"column {field.name!r} has {column.null_count} rows without a tensor; remove these rows")
    raw: NDArray[Any] = tensor_values(field, column)
    values = raw if raw.dtype == np.uint8 else _to_float32(raw)
    num_missing = int(_has_nan(values).sum())
    infinite = np.isinf(values)
    if infinite.any():
        values = np.where(infinite, np.float32(np.nan), values)
    missing = _has_nan(values)
    new_field, array = tensor_field(field.name, values)
    return CastColumn("tensor", new_field, array, missing, num_missing, int(infinite.sum()))


def _to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values beyond float32 become infinities, which the callers treat as not convertible."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _has_nan(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the tensors [N, *shape] contains a NaN: [N]."""
    return np.asarray(np.isnan(values).any(axis=tuple(range(1, values.ndim))))
