"""Numbers in text: separators, affixes, and the options that a message proposes for text that is not one."""

import math
from typing import Any

import pyarrow as pa
import pytest

from maas_ray.data.sources.number_text import are_near, propose, read_numbers
from maas_ray.data.spec.reader import ReaderOptions


def _read(texts: list[Any], **fields: Any) -> tuple[list[Any], int, tuple[str, ...]]:
    found = read_numbers(pa.chunked_array([pa.array(texts, pa.string())]), ReaderOptions(**fields))
    values = [None if math.isnan(value) else value for value in found.values.tolist()]
    return values, int(found.failed.sum()), found.examples


@pytest.mark.parametrize(
    ("texts", "fields", "values"),
    [
        (["1", " 2.5 ", "-3e2", None, "", "nan"], {}, [1, 2.5, -300, None, None, None]),
        (["0,5", "-1,25", "3"], {"decimal": ","}, [0.5, -1.25, 3]),
        (["1,634,177", "12", "-1,000.5"], {"thousands": ","}, [1634177, 12, -1000.5]),
        (["1.634,5", "7"], {"thousands": ".", "decimal": ","}, [1634.5, 7]),
        (["$1.98", "-$2", "3"], {"affixes": ["$"]}, [1.98, -2, 3]),
        (["1.6%", "2 %"], {"affixes": ["%"]}, [1.6, 2]),
        (["true", "FALSE", "1"], {}, [1, 0, 1]),
    ],
)
def test_numbers_are_read_with_the_options(texts: list[Any], fields: dict[str, Any], values: list[Any]) -> None:
    assert _read(texts, **fields) == (values, 0, ())


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("1,5", {"thousands": ","}),
        ("1.5", {"decimal": ","}),
        ("1_000", {}),
        ("inf", {}),
        ("1e400", {}),
        (".", {}),
        ("-", {}),
        ("$", {"affixes": ["$"]}),
        ("0x10", {}),
        ("1,6,34", {"thousands": ","}),
    ],
)
def test_other_text_fails_and_is_shown(text: str, fields: dict[str, Any]) -> None:
    assert _read(["1", text, "2", text], **fields) == ([1, None, 2, None], 2, (text,))


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        (["?"], "add '?' to data.missing_values"),
        (["-", "None"], "add '-', 'None' to data.missing_values"),
        (["0,5"], "set data.decimal: ','"),
        (["1,634,177"], "set data.thousands: ','"),
        (["1.634,5"], "set data.decimal: ',' and data.thousands: '.'"),
        (["$1.98"], "set data.affixes: ['$']"),
        (["1,6%"], "set data.decimal: ',' and data.affixes: ['%']"),
        (["inf"], "'inf'"),
    ],
)
def test_the_way_out_fits_the_text(examples: list[str], says: str) -> None:
    assert says in propose(examples, ReaderOptions(), "cleaning.columns.a")
    assert "cleaning.columns.a.cast" in propose(examples, ReaderOptions(), "cleaning.columns.a")


def test_text_that_is_nearly_a_number_is_counted() -> None:
    near, words = ["$1.98", "1,5", "1.634,5", "2%", "7"], ["a", "2020-01-01", "1,2,3,4", "v1"]
    assert are_near(pa.chunked_array([pa.array([*near, *words, None])])).tolist() == [True] * 5 + [False] * 5
