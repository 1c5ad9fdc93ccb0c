"""Tests of the column kinds, of missing values, and of the count of values that could not be converted."""

import json
import re
from dataclasses import asdict
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.sources.booleans import is_boolean
from maas_ray.data.sources.cast import Cast, CastColumn, CastLimits, cast_column
from maas_ray.data.sources.survey import Survey, survey_column
from maas_ray.data.spec.cleaning import ColumnPolicy
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.errors import DataError

ANY = CastLimits(max_unconvertible=1, max_numbers_in_text=1)


def _cast(values: Any, to: str | None = None, is_typed: bool = True, kind: pa.DataType | None = None) -> CastColumn:
    array = pa.chunked_array([pa.array(values, kind)])
    column, _ = cast_column(pa.field("c", array.type), array, ColumnPolicy(cast=to), is_typed, limits=ANY)
    return column


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 3], pa.int64(), [1, None, 3]),
        ([1.5, None, float("nan")], pa.float64(), [1.5, None, None]),
        ([True, None, False], pa.bool_(), [1, None, 0]),
        ([Decimal("1.25"), None], pa.decimal128(5, 2), [1.25, None]),
        ([2, None], pa.uint8(), [2, None]),
        ([1, 2, 1], pa.dictionary(pa.int32(), pa.int64()), [1, 2, 1]),
    ],
)
def test_numbers_become_float32_with_nan_for_missing(values: list, kind: pa.DataType, expected: list) -> None:
    column = _cast(values, kind=kind)
    assert column.kind == "numeric"
    assert column.values.type == pa.float32()
    assert [None if np.isnan(x) else x for x in column.values.to_numpy()] == expected
    assert column.missing.tolist() == [x is None for x in expected]
    assert column.num_missing == expected.count(None)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_becomes_categories_with_an_empty_string_for_missing(kind: pa.DataType) -> None:
    column = _cast(["b", None, "", "1"], kind=kind)
    assert column.kind == "categorical"
    assert column.values.to_pylist() == ["b", "", "", "1"]
    assert (column.num_missing, column.num_unconvertible) == (2, 0)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", " 2.5 ", "-3e2", None], "numeric"),
        (["true", "False", "TRUE", None], "numeric"),
        (["1", "2", "three"], "categorical"),
        (["1_000", "2"], "categorical"),
    ],
)
def test_a_column_of_a_text_format_is_a_number_if_every_present_value_reads_as_one(values: list, kind: str) -> None:
    assert _cast(values, is_typed=False).kind == kind


def test_text_of_a_typed_format_stays_text() -> None:
    assert _cast(["1", "2"]).kind == "categorical"


@pytest.mark.parametrize(
    "values", [["1", "2", "x", None, "nan", "inf", "1e39", "y", "x"], ["7", "1e400", None, "-inf"]]
)
def test_values_that_cannot_be_converted_are_counted_and_missing(values: list) -> None:
    column = _cast(values, to="number")
    bad = [value for value in values if value in ("x", "y", "inf", "-inf", "1e39", "1e400")]
    absent = [value for value in values if value in (None, "nan")]
    assert column.num_unconvertible == len(bad)
    assert column.num_missing == len(absent)
    assert column.missing.tolist() == [value in bad or value in absent for value in values]


def test_numbers_beyond_float32_are_not_convertible() -> None:
    column = _cast([1.0, 1e39, -1e300, float("inf"), None])
    assert (column.num_unconvertible, column.num_missing) == (3, 1)


@pytest.mark.parametrize(
    ("values", "type_", "expected"),
    [
        ([3, 1, 2], pa.int64(), [3, 1, 2]),
        ([3.0, 1.0], pa.int64(), [3, 1]),
        ([3, None], pa.string(), ["3", ""]),
        ([3.0, None, float("nan")], pa.string(), ["3", "", ""]),
        ([0.5, 1.0], pa.string(), ["0.5", "1"]),
        ([True, None], pa.string(), ["true", ""]),
        (["10", "-2"], pa.int64(), [10, -2]),
        (["007", "1"], pa.string(), ["007", "1"]),
    ],
)
def test_a_cast_to_category_gives_integers_only_where_every_value_is_one(
    values: list, type_: pa.DataType, expected: list
) -> None:
    column = _cast(values, to="category")
    assert column.kind == "categorical"
    assert column.values.type == type_
    assert column.values.to_pylist() == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int32, np.bool_])
def test_tensors_keep_their_shape_and_bytes_stay_bytes(dtype: type) -> None:
    values = (np.arange(24).reshape(4, 2, 3) % 2).astype(dtype)
    field, array = tensor_field("c", values)
    column = cast_column(field, pa.chunked_array([array.slice(0, 1), array.slice(1)]), ColumnPolicy(), True)[0]
    flat = column.values.flatten().to_numpy()
    assert np.array_equal(flat.reshape(4, 2, 3), values)
    assert flat.dtype == (np.uint8 if dtype is np.uint8 else np.float32)


def test_holes_in_a_tensor_are_counted() -> None:
    values = np.ones((4, 3))
    values[1, 0], values[2, 1], values[2, 2] = np.nan, np.inf, 1e39
    field, array = tensor_field("c", values)
    column = cast_column(field, pa.chunked_array([array]), ColumnPolicy(), True)[0]
    assert column.missing.tolist() == [False, True, True, False]
    assert (column.num_missing, column.num_unconvertible) == (1, 2)


@pytest.mark.parametrize(
    ("values", "kind", "to", "says"),
    [
        ([date(2020, 1, 1)], pa.date32(), None, "contains dates"),
        ([time(12)], pa.time32("s"), None, "type time32"),
        ([{"a": 1}], None, None, "type struct"),
        ([[1, 2], [3]], None, None, "type list"),
        ([[1, 2], [3, 4]], pa.list_(pa.int64(), 2), "number", "cannot be cast"),
        ([["a", "b"]], pa.list_(pa.string(), 2), None, "must contain numbers"),
        ([[1, 2], None], pa.list_(pa.int64(), 2), None, "1 rows without a tensor"),
    ],
)
def test_types_that_fit_no_kind_are_refused(values: list, kind: Any, to: str | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        _cast(values, to=to, kind=kind)


def _choose(texts: list[Any], to: str | None = None, **policy: Any) -> Cast:
    array = pa.chunked_array([pa.array(texts, pa.string())])
    return cast_column(pa.field("c", pa.string()), array, ColumnPolicy(cast=to, **policy), False)[1]


@pytest.mark.parametrize("odd", ["?", "-", ".", "None", "<NA>", "inf", "1e400", "1,634"])
def test_a_few_texts_among_numbers_are_refused_with_the_way_out(odd: str) -> None:
    texts = [odd if i % 20 == 0 else str(i) for i in range(60)]
    with pytest.raises(DataError, match=f"3 of 60 values are not numbers, such as {re.escape(repr(odd))}") as caught:
        _choose(texts)
    assert "cleaning.columns.c.cast" in str(caught.value)
    assert _choose(texts, "category").kind == "categorical"
    with pytest.raises(DataError, match="raise data.max_unconvertible"):
        _choose([odd, odd, *texts[:20]], "number")


@pytest.mark.parametrize("text", ["0,{}", "${}.98", "1.{}%", "1,634,{:03}", "1.634,{}"])
def test_numbers_in_another_notation_are_never_categories(text: str) -> None:
    with pytest.raises(DataError, match=r"set data\.(decimal|thousands|affixes)"):
        _choose([text.format(i) for i in range(10, 40)])


def test_leading_zeros_are_text_and_dates_need_a_cast() -> None:
    cast = _choose(["01234", "94110", "00501"])
    assert (cast.kind, cast.reason) == (
        "categorical",
        "2 of 3 values have leading zeros, such as '01234'",
    )
    with pytest.raises(DataError, match=r"contains dates.*cast: date"):
        _choose(["2024-01-01", "2024-01-02"])
    assert _choose(["2024-01-01", "2024-01-02"], "date", encoding="cyclic").encoding == "cyclic"
    with pytest.raises(DataError, match="date_format"):
        _choose(["1.2.2024", "2.2.2024"], "date")


def test_numbers_far_from_zero_keep_their_differences() -> None:
    ids = [str(10**11 + i) for i in range(42)]
    array = pa.chunked_array([pa.array(ids)])
    column, cast = cast_column(pa.field("c", pa.string()), array, ColumnPolicy(), False)
    assert (cast.offset, cast.is_counting) == (1e11, True)
    assert column.values.type == pa.float64()
    assert len(set(column.values.to_pylist())) == 42
    near = cast_column(pa.field("c", pa.string()), pa.chunked_array([["1.25", "99.1"]]), ColumnPolicy(), False)
    assert near[1].offset is None


@pytest.mark.parametrize("is_typed", [True, False])
def test_integers_beyond_float64_are_refused(is_typed: bool) -> None:
    big = [1152921504606846976, 7]
    array = pa.chunked_array([pa.array(big if is_typed else [str(one) for one in big])])
    with pytest.raises(DataError, match=r"beyond 2\*\*53.*cleaning.columns.c.cast: category"):
        cast_column(pa.field("c", array.type), array, ColumnPolicy(), is_typed)
    assert (
        cast_column(pa.field("c", array.type), array, ColumnPolicy(cast="category"), is_typed)[0].kind == "categorical"
    )


def test_surveys_of_chunks_merge_to_the_survey_of_the_whole() -> None:
    texts = ["1", "x", None, "07", "2024-01-01", "3.5", "y", "x", "1e9"]
    for kind in (texts, [str(i) for i in range(9)]):
        whole = survey_column(pa.field("c", pa.string()), pa.chunked_array([kind]), None, ReaderOptions())
        merged = Survey()
        for start in range(0, 9, 2):
            part = pa.chunked_array([pa.array(kind[start : start + 2], pa.string())])
            found = survey_column(pa.field("c", pa.string()), part, None, ReaderOptions())
            merged = merged.merged(Survey.parsed(json.loads(json.dumps(asdict(found)))))
        assert merged == whole


@pytest.mark.parametrize(
    ("values", "is_typed", "expected"),
    [
        (["true", None, "FALSE "], False, True),
        (["true", "1"], False, False),
        (["1", "0"], False, False),
        ([True, None, False], True, True),
        (pa.array([True, False]).dictionary_encode(), True, True),
        ([1, 0], True, False),
    ],
)
def test_columns_of_booleans_are_noted(values: Any, is_typed: bool, expected: bool) -> None:
    column = pa.chunked_array([values if isinstance(values, pa.Array) else pa.array(values)])
    found, cast = cast_column(pa.field("x", column.type), column, ColumnPolicy(), is_typed)
    assert (found.kind, cast.is_boolean, is_boolean(found.field)) == ("numeric", expected, expected)
