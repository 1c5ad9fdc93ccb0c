"""The split depends on row indices, fractions and the seed alone, or on a column."""

import numpy as np
import pyarrow as pa
import pytest

from maas_ray.data.spec.data import SPLITS, SplitSpec
from maas_ray.data.table.split import assign_rows
from maas_ray.errors import DataError

GOLDEN = [0, 0, 2, 0, 0, 2, 1, 0, 1, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0]


def _sizes(assigned: np.ndarray) -> list[int]:
    return [int((assigned == code).sum()) for code in range(len(SPLITS))]


@pytest.mark.parametrize(
    ("n", "validation", "test", "sizes"),
    [(100, 0.1, 0.2, [70, 10, 20]), (7, 0.2, 0.2, [5, 1, 1]), (5, 0, 0, [5, 0, 0]), (1000, 0, 0.5, [500, 0, 500])],
)
def test_fractions_give_these_many_rows(n: int, validation: float, test: float, sizes: list[int]) -> None:
    assert _sizes(assign_rows(SplitSpec(validation=validation, test=test), n)) == sizes


def test_the_split_is_the_one_that_was_released() -> None:
    assert assign_rows(SplitSpec(seed=3), 20).tolist() == GOLDEN


def test_another_seed_gives_another_split() -> None:
    one, two = (assign_rows(SplitSpec(seed=seed), 1000) for seed in (1, 2))
    assert 0 < (one != two).sum() < 1000


def test_rows_are_spread_over_the_whole_data_set() -> None:
    test_rows = np.flatnonzero(assign_rows(SplitSpec(), 10_000) == SPLITS.index("test"))
    assert abs(test_rows.mean() - 5000) < 200
    assert abs((test_rows < 5000).mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("n", "spec", "says"),
    [
        (2, SplitSpec(), "too few for a test|too few for a validation"),
        (3, SplitSpec(validation=0.1, test=0.4), "too few for a validation split of 0.1"),
        (2, SplitSpec(validation=0.45, test=0.5), "none is left|too few"),
        (1, SplitSpec(validation=0, test=0.9), "none is left"),
    ],
)
def test_too_few_rows_are_refused(n: int, spec: SplitSpec, says: str) -> None:
    with pytest.raises(DataError, match=says):
        assign_rows(spec, n)


def test_a_column_can_name_the_split() -> None:
    column = pa.chunked_array([["train", "test"], ["validation", "train"]])
    assigned = assign_rows(SplitSpec(column="part"), 4, column)
    assert [SPLITS[code] for code in assigned] == ["train", "test", "validation", "train"]


@pytest.mark.parametrize("value", ["val", "", None, "Train"])
def test_another_word_in_the_split_column_is_refused(value: str | None) -> None:
    with pytest.raises(DataError, match="the split column 'part' contains"):
        assign_rows(SplitSpec(column="part"), 2, pa.chunked_array([["train", value]]))
