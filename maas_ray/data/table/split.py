"""Assigns each row to a split, by its index or by a column."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.loading.order import find_positions, permute
from maas_ray.data.sources.cast import to_text
from maas_ray.data.spec.data import SPLITS, SplitSpec
from maas_ray.errors import DataError

_EPOCH = (1 << 64) - 1
"""The split uses a permutation that no training run reaches, so the two are unrelated even with the same seed."""


def assign_rows(spec: SplitSpec, num_rows: int, column: pa.ChunkedArray | None = None) -> NDArray[np.int8]:
    """Assigns a split to every row.

    Args:
        spec: the fractions and the seed, or the column's name.
        num_rows: rows before any is dropped, so that a dropped row does not change the split of others.
        column: values of the split column.

    Returns:
        int8 [num_rows]: the index of the row's split in `SPLITS`.

    Raises:
        DataError: there are too few rows for a split, or a value in the split column is not a split.
    """
    if column is not None:
        return _by_column(str(spec.column), column)
    num_test, num_validation = count_held_out(spec, num_rows)
    shuffled = permute(spec.seed, _EPOCH, num_rows, np.arange(num_rows, dtype=np.int64))
    result = np.zeros(num_rows, dtype=np.int8)
    result[shuffled[:num_test]] = SPLITS.index("test")
    result[shuffled[num_test : num_test + num_validation]] = SPLITS.index("validation")
    return result


def assign_range(
    spec: SplitSpec, num_rows: int, start: int, stop: int, column: pa.ChunkedArray | None = None
) -> NDArray[np.int8]:
    """As `assign_rows`, for the rows [start, stop) of `num_rows`; `column` contains these rows alone."""
    if column is not None:
        return _by_column(str(spec.column), column)
    num_test, num_validation = count_held_out(spec, num_rows)
    places = find_positions(spec.seed, _EPOCH, num_rows, np.arange(start, stop, dtype=np.int64))
    codes = (SPLITS.index("test"), SPLITS.index("validation"), SPLITS.index("train"))
    return np.select([places < num_test, places < num_test + num_validation], codes[:2], codes[2]).astype(np.int8)


def count_held_out(spec: SplitSpec, num_rows: int) -> tuple[int, int]:
    """Rows of the test and of the validation split.

    Raises:
        DataError: there are too few rows for a split.
    """
    num_test, num_validation = (round(num_rows * fraction) for fraction in (spec.test, spec.validation))
    for name, fraction, num in (("test", spec.test, num_test), ("validation", spec.validation, num_validation)):
        if fraction and not num:
            raise DataError(
                f"{num_rows} rows are too few for a {name} split of {fraction}; add rows, or change data.split.{name}"
            )
    if num_rows - num_test - num_validation < 1:
        raise DataError(
            f"{num_rows} rows are too few: none is left for training after {num_test} test and {num_validation} "
            "validation rows; add rows, or change data.split"
        )
    return num_test, num_validation


def _by_column(name: str, column: pa.ChunkedArray) -> NDArray[np.int8]:
    text = np.asarray(to_text(name, column).to_numpy(zero_copy_only=False), dtype=object)
    unknown = sorted({str(value) for value in text} - set(SPLITS))
    if unknown:
        raise DataError(
            f"the split column {name!r} contains {', '.join(map(repr, unknown[:10]))}; expected {', '.join(SPLITS)}"
        )
    result = np.zeros(len(text), dtype=np.int8)
    for code, split in enumerate(SPLITS):
        result[text == split] = code
    return result
