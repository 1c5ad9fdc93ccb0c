"""Assigns each row to a split: by its index, by a column that names the split, or by a rule of `split_rules.py`."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.loading.order import find_positions
from maas_ray.data.sources.text import to_text
from maas_ray.data.spec.data import SPLITS, DataSpec, SplitSpec
from maas_ray.data.table.split_rules import (
    count_keys,
    fold_size,
    hold_out,
    make_rule,
    refuse_leak,
    split_keys,
)
from maas_ray.errors import DataError

_EPOCH = (1 << 64) - 1
"""The split uses a permutation that no training run reaches, so the two are unrelated even with the same seed."""


def assign_table(spec: DataSpec, table: pa.Table) -> NDArray[np.int8]:
    """Assigns a split to every row of a whole table with the columns of the split.

    Returns:
        int8 [N]: the index of the row's split in `SPLITS`, or -1 for a row in no split (folds in order).

    Raises:
        DataError: the rows or the values of the column do not allow the split.
    """
    split, key = spec.split, spec.split.key(spec.target)
    keys = split_keys(key, table.column(key)) if key is not None else None
    if split.column is not None:
        assigned = assign_rows(split, table.num_rows, table.column(split.column))
        if key is not None and keys is not None:
            refuse_leak(key, keys, assigned)
        return assigned
    if key is None or keys is None:
        return assign_rows(split, table.num_rows)
    return make_rule(split, key, count_keys(keys)).assign(keys, {})


def assign_rows(spec: SplitSpec, num_rows: int, column: pa.ChunkedArray | None = None) -> NDArray[np.int8]:
    """Assigns a split to every row, by its index or by the split column.

    Args:
        spec: the fractions and the seed, or the column's name.
        num_rows: rows before any is dropped, so that a dropped row does not change the split of others.
        column: values of the split column.

    Returns:
        int8 [num_rows]: the index of the row's split in `SPLITS`.

    Raises:
        DataError: there are too few rows for a split, or a value in the split column is not a split.
    """
    return assign_range(spec, num_rows, 0, num_rows, column)


def assign_range(
    spec: SplitSpec, num_rows: int, start: int, stop: int, column: pa.ChunkedArray | None = None
) -> NDArray[np.int8]:
    """As `assign_rows`, for the rows [start, stop) of `num_rows`; `column` contains these rows alone."""
    if column is not None:
        return _by_column(str(spec.column), column)
    num_test, num_validation = count_held_out(spec, num_rows)
    places = find_positions(spec.seed, _EPOCH, num_rows, np.arange(start, stop, dtype=np.int64))
    fold = (spec.fold.index, spec.fold.of) if spec.fold is not None else None
    return hold_out(places, num_test, num_validation, fold)


def count_held_out(spec: SplitSpec, num_rows: int) -> tuple[int, int]:
    """Rows of the test and of the validation split.

    Raises:
        DataError: there are too few rows for a split.
    """
    num_test, num_validation = (round(num_rows * fraction) for fraction in (spec.test, spec.validation))
    test = spec.test
    if spec.fold is not None:
        test, num_test = 1 / spec.fold.of, fold_size(0, num_rows, spec.fold.index, spec.fold.of)
    for name, fraction, num in (("test", test, num_test), ("validation", spec.validation, num_validation)):
        if fraction and not num:
            raise DataError(
                f"{num_rows} rows are too few for a {name} split of {fraction:g}; add rows, or change data.split.{name}"
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
