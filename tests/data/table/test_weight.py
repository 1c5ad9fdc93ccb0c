"""The column of weights: numbers of at least 0, one per row."""

from typing import Any

import pyarrow as pa
import pytest

from maas_ray.data.table.weight import cast_weight, refuse_no_weight
from maas_ray.errors import DataError


@pytest.mark.parametrize("values", [["1", "0.5", "0"], [1, 2, 3], [True, False, True], [0.25, 1e30, 0.0]])
def test_numbers_are_weights(values: list[Any]) -> None:
    expected = pytest.approx([float(value) for value in values], rel=1e-6)
    assert cast_weight("w", pa.chunked_array([values])).to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["1", None], "1 of 2 rows have no finite number"),
        (["1", "many"], "no finite number"),
        ([1.0, float("inf")], "no finite number"),
        ([1.0, -0.1, -2.0], "2 of 3 rows have a negative weight in 'w'"),
    ],
)
def test_other_values_are_refused(values: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        cast_weight("w", pa.chunked_array([values]))


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(DataError, match="every row of the training split has the weight 0 in 'w'"):
        refuse_no_weight("w", 0)
    refuse_no_weight("w", 1)
    refuse_no_weight(None, 0)
