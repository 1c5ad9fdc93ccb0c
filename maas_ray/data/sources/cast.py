"""Casts raw columns to the column kinds: numeric, date, categorical and tensor.

A cast table has numeric columns as float32 (NaN is missing), or as float64 where float32 would lose their differences,
dates as float64 seconds since 1970, categories as text ("" is missing) or, where every value is an integer and none is
missing, int64, and tensors as fixed-size lists of float32 or uint8. It has no nulls.
The kind depends on the whole column, which need not be in memory: each chunk is surveyed, and the surveys are merged.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.sources.arrays import tensor_field, tensor_shape, tensor_values
from maas_ray.data.sources.booleans import boolean_field
from maas_ray.data.sources.dates import is_date, read_dates
from maas_ray.data.sources.number_text import Doubles, named, propose, read_numbers
from maas_ray.data.sources.survey import Survey, needs_survey, survey_column
from maas_ray.data.sources.text import decode_column, to_text
from maas_ray.data.sources.wide import date_field, offset_field
from maas_ray.data.spec.cleaning import ColumnPolicy
from maas_ray.data.spec.features import DATE_PARTS, DateEncoding
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.errors import DataError

Kind = Literal["numeric", "categorical", "tensor", "date"]
_FAR = 64.0
"""Numbers whose magnitude is more than this multiple of their range keep fewer than 18 bits of it as float32."""


_DEFAULT_READER = ReaderOptions()


@dataclass(frozen=True)
class CastLimits:
    """Shares of the values of a column above which a cast is refused; see `DataSpec`."""

    max_unconvertible: float = 0.05
    max_numbers_in_text: float = 0.5


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
class Cast:
    """The target type of a column."""

    kind: Kind
    reason: str = ""
    """How the kind was decided, for the report."""
    unconvertible: tuple[str, ...] = ()
    """The first texts that cannot be converted."""
    is_counting: bool = False
    """Each value is the one before it plus 1."""
    is_whole: bool = True
    """A category made of floating-point numbers is written without a fraction."""
    is_integer: bool = False
    """A category is int64."""
    is_boolean: bool = False
    """All numbers are booleans."""
    offset: float | None = None
    """Numbers are float64 and near this one: float32 would lose their differences."""
    encoding: DateEncoding = "parts"
    """Of a date."""
    origin: float = 0.0
    """The first date, in seconds since 1970."""
    date_format: str | None = None
    """Of dates in text."""
    reader: ReaderOptions = _DEFAULT_READER
    """How text is read."""


def cast_column(
    field: pa.Field,
    column: pa.ChunkedArray,
    policy: ColumnPolicy,
    is_typed: bool,
    reader: ReaderOptions | None = None,
    limits: CastLimits | None = None,
) -> tuple[CastColumn, Cast]:
    """Casts one complete feature column; also returns how.

    Args:
        field: name, type and, for a tensor, shape.
        column: raw values.
        policy: the user's policy of the column.
        is_typed: False: the file format has no types (csv), so that text is a number if every present value reads
            as one.
        reader: how text is read.
        limits: shares of values above which a cast is refused.

    Raises:
        DataError: no kind fits the type or the values, or the cast is impossible.
    """
    reader = reader or ReaderOptions()
    survey = Survey()
    if needs_survey(field, policy.cast):
        survey = survey_column(field, column, policy.cast, reader, policy.date_format)
    cast = choose_cast(field, survey, policy, is_typed, reader, limits)
    return apply_cast(field, column, cast), cast


def choose_cast(
    field: pa.Field,
    survey: Survey,
    policy: ColumnPolicy,
    is_typed: bool,
    reader: ReaderOptions | None = None,
    limits: CastLimits | None = None,
) -> Cast:
    """The kind of a column, from the survey of all of it. See `cast_column`.

    Raises:
        DataError: no kind fits the values, or the cast is impossible.
    """
    name, to = field.name, policy.cast
    where, reader, limits = f"cleaning.columns.{name}", reader or ReaderOptions(), limits or CastLimits()
    if tensor_shape(field) is not None:
        if to is not None:
            raise DataError(f"column {name!r} is a tensor and cannot be cast to {to}; remove {where}.cast")
        return Cast("tensor", f"{'x'.join(map(str, tensor_shape(field) or ()))} values per row")
    if to == "date":
        _refuse_unconvertible(name, survey, limits, "date", named(survey.undated), f"set {where}.date_format")
        encoding = policy.encoding if policy.encoding in DATE_PARTS else "parts"
        origin = math.floor(survey.low or 0.0)
        return Cast(
            "date", "cast: date", survey.undated, encoding=encoding, origin=origin, date_format=policy.date_format
        )
    if is_date(field.type) or (to is None and survey.num_values and survey.num_dates == survey.num_values):
        raise DataError(
            f"column {name!r} contains dates; as categories, every later date would be unknown; set {where}.cast: date "
            "(with encoding: parts, epoch or cyclic) or category, or leave it out with cleaning.drop"
        )
    is_text = _is_text(field)
    category = Cast(
        "categorical",
        "cast: category",
        is_counting=_is_counting(survey),
        is_whole=survey.is_whole,
        is_integer=survey.is_integers and survey.is_whole,
    )
    if to == "category":
        return category
    if survey.is_huge:
        raise DataError(
            f"column {name!r} contains integers beyond 2**53, up to {_whole(survey)}, which a number cannot represent "
            f"exactly; set {where}.cast: category, or leave it out with cleaning.drop"
        )
    if to == "number":
        ways = f"{propose(survey.failed, reader)}, remove {where}.cast"
        _refuse_unconvertible(name, survey, limits, "number", named(survey.failed), ways)
        return _number(survey, "cast: number", reader)
    if not is_text:
        number = _number(survey, f"type {field.type}", reader)
        return replace(number, is_boolean=pa.types.is_boolean(_value_type(field)))
    if is_typed:
        return replace(category, reason="the values are text")
    if survey.num_padded:
        example = named(survey.padded[:1])
        reason = f"{survey.num_padded} of {survey.num_values} values have leading zeros, such as {example}"
        return replace(category, reason=reason)
    if not survey.num_failed:
        return _number(survey, f"all {survey.num_values} values are numbers", reader) if survey.num_values else category
    reason = f"{survey.num_failed} of {survey.num_values} values are not numbers, such as {named(survey.failed[:3])}"
    if survey.num_near > limits.max_numbers_in_text * survey.num_values:
        raise DataError(
            f"column {name!r}: {reason}; as a text, each number of the column would be a category of its own: "
            f"{propose(survey.failed, reader, where)}"
        )
    return replace(category, reason=f"text because {reason}")


def apply_cast(field: pa.Field, column: pa.ChunkedArray, cast: Cast) -> CastColumn:
    """Casts a chunk of a column.

    Raises:
        DataError: no kind fits the type, or a whole tensor is missing.
    """
    if cast.kind == "tensor":
        return _tensor(field, column)
    if cast.kind == "date":
        column = column if is_date(column.type) else decode_column(field.name, column)
        return _wide(date_field(field.name, cast.encoding, cast.origin), read_dates(column, cast.date_format), "date")
    column = decode_column(field.name, column)
    if cast.kind == "categorical":
        return _category(field.name, column, cast)
    if cast.offset is not None:
        return _wide(offset_field(field.name, cast.offset), numbers_of(field.name, column, cast.reader), "numeric")
    values, num_unconvertible = to_numbers(column, cast.reader, field.name)
    missing = np.isnan(values)
    num_missing = int(missing.sum()) - num_unconvertible
    field = boolean_field(field.name) if cast.is_boolean else pa.field(field.name, pa.float32())
    return CastColumn("numeric", field, pa.array(values), missing, num_missing, num_unconvertible)


def to_numbers(
    column: pa.ChunkedArray, reader: ReaderOptions | None = None, name: str = ""
) -> tuple[NDArray[np.float32], int]:
    """Converts numbers, booleans or text to float32 [N]; returns it and the number of values that are not convertible.

    Missing and not convertible values become NaN. A number beyond float32 and an infinity are not convertible.

    Args:
        column: values of the column.
        reader: how text is read.
        name: name of the column, for errors.

    Raises:
        DataError: an integer is beyond 2**53.
    """
    found = numbers_of(name, column, reader or ReaderOptions())
    values = _to_float32(found.values)
    infinite = np.isinf(values)
    values[infinite] = np.nan
    return values, int((found.failed | infinite).sum())


def numbers_of(name: str, column: pa.ChunkedArray, reader: ReaderOptions) -> Doubles:
    """Converts numbers, booleans or text to float64 [N].

    Raises:
        DataError: an integer is beyond 2**53.
    """
    if pa.types.is_string(column.type):
        return read_numbers(column, reader)
    try:
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"column {name!r} contains integers beyond 2**53, which a number cannot represent exactly; set "
            f"cleaning.columns.{name}.cast: category, or leave it out with cleaning.drop"
        ) from error
    return Doubles(values, np.isinf(values))


def _number(survey: Survey, reason: str, reader: ReaderOptions) -> Cast:
    low, high, offset = survey.low, survey.high, None
    if low is not None and high is not None and low < high and not survey.is_exact:
        is_far = max(abs(low), abs(high)) > _FAR * (high - low)
        offset = float(math.floor(low)) if is_far else None
    is_boolean = 0 < survey.num_truth == survey.num_values
    counting = _is_counting(survey)
    return Cast("numeric", reason, survey.failed, counting, is_boolean=is_boolean, offset=offset, reader=reader)


def _is_counting(survey: Survey) -> bool:
    return survey.is_counting and survey.first != survey.last


def _refuse_unconvertible(name: str, survey: Survey, limits: CastLimits, what: str, such: str, ways: str) -> None:
    if survey.num_failed > limits.max_unconvertible * survey.num_values:
        raise DataError(
            f"column {name!r}: {survey.num_failed} of {survey.num_values} values are not convertible to a {what}, such as "
            f"{such}; the limit is a share of {limits.max_unconvertible:g}: {ways}, or raise data.max_unconvertible"
        )


def _is_text(field: pa.Field) -> bool:
    kind = _value_type(field)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return not (is_number or pa.types.is_boolean(kind))


def _value_type(field: pa.Field) -> pa.DataType:
    return field.type.value_type if pa.types.is_dictionary(field.type) else field.type


def _whole(survey: Survey) -> str:
    return f"{max(survey.high or 0.0, -(survey.low or 0.0)):.0f}"


def _wide(field: pa.Field, found: Doubles, kind: Kind) -> CastColumn:
    values = np.where(found.failed, np.nan, found.values)
    missing = np.isnan(values)
    num_unconvertible = int(found.failed.sum())
    num_missing = int(missing.sum()) - num_unconvertible
    return CastColumn(kind, field, pa.array(values, pa.float64()), missing, num_missing, num_unconvertible)


def _category(name: str, column: pa.ChunkedArray, cast: Cast) -> CastColumn:
    text = to_text(name, column, cast.is_whole)
    missing = np.asarray(pc.equal(text, "").to_numpy(zero_copy_only=False))
    values = text.cast(pa.int64()) if cast.is_integer else text
    return CastColumn("categorical", pa.field(name, values.type), values, missing, int(missing.sum()), 0)


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
