"""Converts scalar columns to plain Arrow types and to text."""

import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.errors import DataError


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


def integers(text: pa.Array) -> pa.Array | None:
    """The integers in `text` if each is written in the usual way, else None (`007` is text)."""
    try:
        integers = text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return integers if integers.cast(pa.string()).equals(text) else None
