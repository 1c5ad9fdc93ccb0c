"""Casts and checks the column with the weights of rows. The checks of blocks of rows can be combined."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.sources.cast import to_numbers
from maas_ray.data.sources.text import decode_column
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.errors import DataError


def cast_weight(name: str, column: pa.ChunkedArray, reader: ReaderOptions | None = None) -> pa.Array:
    """The weights as float32 [N].

    Args:
        name: name of the column.
        column: values of the column.
        reader: how text is read.

    Raises:
        DataError: a weight is missing, not a number, infinite or negative.
    """
    values, _ = to_numbers(decode_column(name, column), reader, name)
    for is_wrong, what in ((np.isnan(values), "no finite number as their weight"), (values < 0, "a negative weight")):
        if is_wrong.any():
            raise DataError(
                f"data.weight: {int(is_wrong.sum())} of {len(values)} rows have {what} in {name!r}; a "
                "weight is 0 or larger; correct or remove these rows"
            )
    return pa.array(values)


def read_weight(spec: DataSpec, table: pa.Table, train: NDArray[np.int64]) -> pa.Array | None:
    """The weights of a whole table, or None without weights.

    Args:
        spec: the data spec.
        table: the raw table.
        train: the rows of the training split.

    Raises:
        DataError: see `cast_weight` and `refuse_no_weight`.
    """
    if spec.weight is None:
        return None
    weights = cast_weight(spec.weight, table.column(spec.weight), spec.reader)
    refuse_no_weight(spec.weight, num_weighted(weights.take(pa.array(train))))
    return weights


def num_weighted(weights: pa.Array) -> int:
    """The number of rows with a weight above 0."""
    return int((weights.to_numpy() > 0).sum())


def refuse_no_weight(name: str | None, number: int) -> None:
    """Raises `DataError` if no training row has a weight above 0."""
    if name is not None and not number:
        raise DataError(
            f"data.weight: every row of the training split has the weight 0 in {name!r}; nothing is learned"
        )
