"""Reads columns of raw rows without a target, with the reader of training; for clients of served models."""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.sources.arrays import tensor_shape, tensor_values
from maas_ray.data.sources.files import list_files
from maas_ray.data.sources.table import read_files
from maas_ray.data.spec.data import DataSpec


def read_raw_columns(spec: DataSpec, names: Sequence[str], check: Callable[[list[str]], None]) -> pa.Table:
    """The given columns of a file, or of all files of a directory or glob.

    Args:
        spec: names the files, and the options for reading their text.
        names: the columns.
        check: called with the columns of each file; raises if one is missing.

    Raises:
        DataError: a file cannot be read, or the files do not fit together.
    """

    def select(table: pa.Table, path: str) -> pa.Table:
        check(table.column_names)
        return table.select(list(names))

    return read_files(spec, [file.path for file in list_files(spec)], select)


def tensor_rows(field: pa.Field, column: pa.ChunkedArray) -> NDArray[Any] | None:
    """Tensors [rows, *shape]; None: the column has one value per row."""
    return None if tensor_shape(field) is None else tensor_values(field, column)
