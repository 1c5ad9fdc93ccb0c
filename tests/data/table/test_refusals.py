"""What is wrong with several columns is named at once."""

import re

import pytest

from maas_ray.data.table.refusals import MAX_NAMED, Refusals
from maas_ray.errors import DataError


def test_one_refusal_is_raised_as_it_is() -> None:
    refusals, error = Refusals(), DataError("column 'a' has no value")
    with refusals.collect():
        raise error
    with pytest.raises(DataError) as raised:
        refusals.refuse()
    assert raised.value is error


def test_several_are_named_together_up_to_a_limit() -> None:
    refusals = Refusals()
    for number in range(MAX_NAMED + 2):
        with refusals.collect():
            raise DataError(f"column {number}")
    with pytest.raises(
        DataError, match=re.escape(f"{MAX_NAMED + 2} columns need a decision: (1) column 0; (2) column 1")
    ) as raised:
        refusals.refuse()
    assert str(raised.value).endswith(f"({MAX_NAMED}) column {MAX_NAMED - 1}; and 2 more")


def test_nothing_is_raised_without_a_refusal_and_other_errors_pass() -> None:
    refusals = Refusals()
    refusals.refuse()
    with pytest.raises(ZeroDivisionError), refusals.collect():
        raise ZeroDivisionError
    refusals.refuse()
