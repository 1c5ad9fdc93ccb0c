"""Encodes categories as integer codes for training and evaluation; the exported graph does so for the endpoint."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.arrays import Array
from maas_ray.data.sources.wide import narrowing_of
from maas_ray.data.spec.features import CategoricalColumn, Column, Features
from maas_ray.errors import DataError


def encode_columns(features: Features, columns: Sequence[Array]) -> list[Array]:
    """Encodes raw columns as the columns that `Preprocess` takes.

    Args:
        features: the fitted features.
        columns: raw columns in the order of the features, as `Dataset.read` returns them.

    Returns:
        Categorical columns as int64 codes [N, 1]: a missing value (an empty string) becomes the code of the fill, and
        a category that the training split does not contain becomes `unknown_code`. Columns of float64 as float32 [N, k],
        see `sources/wide.py`. All other columns unchanged.

    Raises:
        DataError: the number of columns differs, or a column without a fill has a missing value.
    """
    if len(columns) != len(features.columns):
        raise DataError(f"got {len(columns)} columns; expected {len(features.columns)}, one per feature")
    return [
        encode_column(column, values) if column.kind == "categorical" else narrow(column, values)
        for column, values in zip(features.columns, columns, strict=True)
    ]


def narrow(column: Column, values: Array) -> Array:
    """The float32 numbers of a float64 column; other columns unchanged."""
    narrowing = narrowing_of(column)
    if narrowing is None:
        return values
    narrowed: Array = narrowing.apply(np, values)
    return narrowed


def encode_column(column: CategoricalColumn, values: Array) -> Array:
    """Encodes one categorical column; see `encode_columns`."""
    kind = pa.string() if column.datatype == "BYTES" else pa.int64()
    found = pc.index_in(pa.array(values.reshape(-1), kind), value_set=pa.array(column.categories, kind))
    codes: NDArray[np.int64] = pc.fill_null(found, column.unknown_code).to_numpy(zero_copy_only=False).astype(np.int64)
    if column.datatype == "BYTES":
        missing = values.reshape(-1) == ""
        if missing.any():
            if column.fill is None:
                raise DataError(
                    f"column {column.name!r} has {int(missing.sum())} missing values and no replacement for them; "
                    f"set cleaning.columns.{column.name}.missing"
                )
            codes[missing] = column.fill
    return codes.reshape(-1, 1)
