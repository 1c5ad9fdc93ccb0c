"""Surveys the values of a column for everything that its kind depends on. Surveys of chunks are merged in their order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.sources.arrays import tensor_shape
from maas_ray.data.sources.booleans import count_truth
from maas_ray.data.sources.dates import is_date, read_dates
from maas_ray.data.sources.number_text import MAX_EXAMPLES, are_near, read_numbers, short
from maas_ray.data.sources.text import are_whole, decode_column, integers, to_text
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.errors import DataError

MAX_EXACT = 2**53
"""Largest integer below which float64 represents every integer."""
_PADDED = r"^[+-]?0\d+$"


@dataclass(frozen=True)
class Survey:
    """The properties of a chunk of a column that decide the kind of the whole column."""

    num_values: int = 0
    """Values that are present."""
    num_failed: int = 0
    """Texts that are present and not numbers."""
    failed: tuple[str, ...] = ()
    """The first of them, distinct."""
    num_near: int = 0
    """Texts that are numbers, or would be with other separators or without a sign such as `$`."""
    num_truth: int = 0
    """Texts that are true or false."""
    num_padded: int = 0
    """Whole numbers written with leading zeros, such as `007`: codes, not numbers."""
    padded: tuple[str, ...] = ()
    """The first of them, distinct."""
    num_dates: int = 0
    """Texts that are dates."""
    undated: tuple[str, ...] = ()
    """The first texts that are not dates, distinct, if the column is cast to dates."""
    is_whole: bool = True
    """Every number that is present is whole and below 2**53."""
    is_integers: bool = True
    """No value is missing, and each is an integer written in the usual way (`007` is text)."""
    is_huge: bool = False
    """There is an integer beyond 2**53, which a number cannot represent exactly."""
    is_exact: bool = True
    """Every number is a float32."""
    low: float | None = None
    """The smallest number, or time in seconds."""
    high: float | None = None
    """The largest one."""
    is_counting: bool = True
    """Each number is the one before it plus 1, and none is missing."""
    first: float | None = None
    """The number of the first row, if `is_counting`."""
    last: float | None = None
    """The number of the last row, if `is_counting`."""

    def merged(self, later: "Survey") -> "Survey":
        """The survey of this chunk and a later one together."""
        lows = [one for one in (self.low, later.low) if one is not None]
        highs = [one for one in (self.high, later.high) if one is not None]
        is_counting = (
            self.is_counting
            and later.is_counting
            and (self.last is None or later.first is None or later.first == self.last + 1)
        )
        first = self.first if self.first is not None else later.first
        last = later.last if later.last is not None else self.last
        return Survey(
            num_values=self.num_values + later.num_values,
            num_failed=self.num_failed + later.num_failed,
            failed=_first(self.failed + later.failed),
            num_near=self.num_near + later.num_near,
            num_truth=self.num_truth + later.num_truth,
            num_padded=self.num_padded + later.num_padded,
            padded=_first(self.padded + later.padded),
            num_dates=self.num_dates + later.num_dates,
            undated=_first(self.undated + later.undated),
            is_whole=self.is_whole and later.is_whole,
            is_integers=self.is_integers and later.is_integers,
            is_huge=self.is_huge or later.is_huge,
            is_exact=self.is_exact and later.is_exact,
            low=min(lows) if lows else None,
            high=max(highs) if highs else None,
            is_counting=is_counting,
            first=first if is_counting else None,
            last=last if is_counting else None,
        )

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "Survey":
        """The inverse of `dataclasses.asdict` and JSON."""
        values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in found.items()}
        return cls(**values)


def needs_survey(field: pa.Field, to: str | None) -> bool:
    """Whether the cast depends on the values and not on the type alone."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if tensor_shape(field) is not None or pa.types.is_boolean(kind):
        return to == "category" and tensor_shape(field) is None
    if pa.types.is_integer(kind):
        return to == "category" or kind.bit_width > 16
    is_small = pa.types.is_float16(kind) or pa.types.is_float32(kind)
    return to == "category" or not is_small


def survey_column(
    field: pa.Field, column: pa.ChunkedArray, to: str | None, reader: ReaderOptions, date_format: str | None = None
) -> Survey:
    """Surveys a chunk of a column.

    Args:
        field: name and type.
        column: raw values.
        to: the cast that the user asks for.
        reader: how text is read.
        date_format: format of the dates in text.

    Raises:
        DataError: no kind fits the type.
    """
    if tensor_shape(field) is not None:
        return Survey()  # `choose_cast` reports a wrong cast
    if to == "date" or is_date(column.type):
        return _survey_dates(field.name, column, date_format)
    column = decode_column(field.name, column)
    num_values = len(column) - column.null_count
    if not pa.types.is_string(column.type):
        return _survey_typed(field.name, column, num_values, to)
    found = read_numbers(column, reader)
    padded = column.filter(pc.fill_null(pc.match_substring_regex(pc.utf8_trim_whitespace(column), _PADDED), False))
    text = to_text(field.name, column)
    is_integers = not pc.any(pc.equal(text, "")).as_py() and integers(text) is not None
    num_failed = int(found.failed.sum())
    num_dates, num_near = 0, num_values
    if num_failed:
        is_number = ~found.failed & column.is_valid().to_numpy()
        num_near = int((is_number | are_near(column)).sum())
        dates = read_dates(column)
        num_dates = num_values - int(dates.failed.sum())
    low, high = _bounds(found.values)
    return Survey(
        num_values=num_values,
        num_failed=num_failed,
        failed=found.examples,
        num_near=num_near,
        num_truth=count_truth(column),
        num_padded=len(padded),
        padded=_first(tuple(short(one) for one in pc.unique(padded).slice(0, MAX_EXAMPLES).to_pylist())),
        num_dates=num_dates,
        is_integers=is_integers,
        is_huge=_has_huge(column, found.values),
        is_exact=_are_exact(found.values),
        low=low,
        high=high,
        **_counting(found.values),
    )


def _survey_dates(name: str, column: pa.ChunkedArray, form: str | None) -> Survey:
    if not is_date(column.type):
        column = decode_column(name, column)
        if not pa.types.is_string(column.type):
            raise DataError(
                f"column {name!r} has type {column.type}, which is not a date; remove cleaning.columns.{name}.cast"
            )
    found = read_dates(column, form)
    low, high = _bounds(found.values)
    num_values = len(column) - column.null_count
    num_failed = int(found.failed.sum())
    return Survey(
        num_values=num_values,
        num_failed=num_failed,
        num_dates=num_values - num_failed,
        undated=found.examples,
        is_integers=False,
        low=low,
        high=high,
    )


def _survey_typed(name: str, column: pa.ChunkedArray, num_values: int, to: str | None) -> Survey:
    is_float = pa.types.is_floating(column.type)
    is_whole = not is_float or are_whole(column)
    is_integers = False
    if to == "category":
        text = to_text(name, column, is_whole)
        is_integers = not pc.any(pc.equal(text, "")).as_py() and integers(text) is not None
    is_huge = False
    if pa.types.is_integer(column.type) and num_values:
        least, most = (pc.min(column).as_py(), pc.max(column).as_py())
        is_huge = max(abs(least), abs(most)) > MAX_EXACT
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
    low, high = _bounds(values)
    return Survey(
        num_values=num_values,
        is_whole=is_whole,
        is_integers=is_integers,
        is_huge=is_huge,
        is_exact=_are_exact(values),
        low=low,
        high=high,
        **_counting(values),
    )


def _has_huge(column: pa.ChunkedArray, values: NDArray[np.float64]) -> bool:
    """Whether a text is an integer beyond 2**53."""
    places = np.flatnonzero(np.abs(np.nan_to_num(values)) > MAX_EXACT)
    if not len(places):
        return False
    return bool(pc.any(pc.match_substring_regex(column.take(pa.array(places)), r"^\s*[+-]?\d+\s*$")).as_py())


def _bounds(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (None, None)


def _counting(values: NDArray[np.float64]) -> dict[str, Any]:
    if not len(values):
        return {}
    if not (np.diff(values) == 1).all() or not np.isfinite(values[0]):  # a NaN makes a difference a NaN
        return {"is_counting": False}
    return {"first": float(values[0]), "last": float(values[-1])}


def _are_exact(values: NDArray[np.float64]) -> bool:
    with np.errstate(over="ignore"):
        return bool(((values.astype(np.float32) == values) | np.isnan(values)).all())


def _first(examples: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(examples))[:MAX_EXAMPLES]
