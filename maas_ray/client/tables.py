"""Reads the columns of a table for a model with the reader of training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.client.files import FileRows, check_columns
from maas_ray.errors import DataError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from maas_ray.data.spec.data import DataSpec


def read_table_file(path: Path, model: ModelDescription) -> FileRows:
    """Reads a table in any format that training reads.

    Raises:
        DataError: the file cannot be read, lacks an input column, or contains values that do not fit an input.
    """
    from maas_ray.data.sources.raw_rows import read_raw_columns
    from maas_ray.data.spec.data import DataSpec
    from maas_ray.spec import parse_spec

    try:
        spec = parse_spec(DataSpec, {**model.reader, "uri": str(path), "task": "regression"})
    except SpecError as error:
        raise DataError(
            f"the model's metadata has options for reading files that this version does not know: {error}; use the version that published it"
        ) from error
    names = [tensor.name for tensor in model.inputs]
    raw = read_raw_columns(spec, names, lambda found: check_columns(path, found, model.inputs))
    columns: dict[str, NDArray[Any]] = {}
    unconvertible: dict[str, int] = {}
    for tensor in model.inputs:
        field, column = raw.schema.field(tensor.name), raw.column(tensor.name)
        columns[tensor.name], lost = _values(path, spec, tensor, field, column, is_known=bool(model.reader))
        if lost:
            unconvertible[tensor.name] = lost
    return FileRows(columns, num_unconvertible=unconvertible)


def _values(
    path: Path, spec: "DataSpec", tensor: Tensor, field: Any, column: Any, *, is_known: bool
) -> "tuple[NDArray[Any], int]":
    """The values of one input [rows, …], and the number of values that are no numbers.

    An imported model may take NaN although its metadata cannot say so; `is_known` excludes it.
    """
    import numpy as np
    import pyarrow as pa

    from maas_ray.data.sources.cast import numbers_of, to_numbers
    from maas_ray.data.sources.dates import read_dates
    from maas_ray.data.sources.raw_rows import tensor_rows
    from maas_ray.data.sources.text import to_text

    if not tensor.is_scalar and not (tensor.encoding and tensor_rows(field, column) is None):
        rows = tensor_rows(field, column)
        if rows is None or rows[0].size != int(np.prod(tensor.shape)):
            raise DataError(
                f"{path}: column {tensor.name!r} is {field.type}; the model needs {list(tensor.shape)} per row"
            )
        return rows.reshape(len(rows), *tensor.shape), 0
    if tensor.datatype in ("BYTES", "INT64") or tensor.encoding == "text":
        text = to_text(tensor.name, column).to_numpy(zero_copy_only=False).astype(object)
        return _texts(path, tensor, text, is_known=is_known), 0
    numbers: NDArray[Any]
    if tensor.datatype == "FP64":
        own = spec.cleaning.columns.get(tensor.name)
        if own is not None and own.cast == "date":
            found = read_dates(column, own.date_format)
        else:
            found = numbers_of(tensor.name, column, spec.reader)
        numbers, lost = np.where(found.failed, np.nan, found.values), int(found.failed.sum())
    else:
        numbers, lost = to_numbers(column, spec.reader, tensor.name)
    missing = np.isnan(numbers)
    if lost and not tensor.nullable:
        odd = column.filter(pa.array(missing)).drop_null()[0].as_py()
        raise DataError(
            f"{path}: column {tensor.name!r} has {lost} values that are no numbers, such as {str(odd)!r:.100}; correct them"
        )
    if is_known:
        _refuse_missing(path, tensor, int(missing.sum()))
    return numbers.reshape(-1, 1), lost


def _texts(path: Path, tensor: Tensor, text: "NDArray[Any]", *, is_known: bool) -> "NDArray[Any]":
    import numpy as np

    missing = text == ""
    if tensor.encoding or tensor.datatype == "INT64" or is_known:
        _refuse_missing(path, tensor, int(missing.sum()))
    if tensor.datatype == "BYTES" or tensor.encoding == "text":
        return text
    try:
        return np.array([tensor.null_value if one == "" else int(one) for one in text], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: column {tensor.name!r} must contain integers: {error}") from error


def _refuse_missing(path: Path, tensor: Tensor, number: int) -> None:
    if number and (not tensor.nullable or tensor.encoding):
        raise DataError(
            f"{path}: column {tensor.name!r} has {number} missing values, for which the model has no replacement, because its "
            "training data had none; remove these rows, or train with cleaning.columns and a policy for missing values"
        )
