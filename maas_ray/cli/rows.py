"""Reads raw rows for `maas-ray predict` from csv, json or npy; the model's metadata determines their types."""

import csv
import io
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from maas_ray.client import Tensor
from maas_ray.errors import DataError
from maas_ray.foreign.documents import Malformed, read_json
from maas_ray.foreign.files import Unreadable, read_file

MAX_INPUT_BYTES = 1 << 30

Row = dict[str, Any]


def read_rows(path: Path, inputs: Sequence[Tensor]) -> list[Row]:
    """Reads the input rows of a model; columns that are no inputs of it are ignored.

    Args:
        path: `.csv` with a header (an empty numeric cell is a missing value), `.json` with a list of objects, or `.npy`
            with an array [N, …] for a model with one input.
        inputs: the model's inputs.

    Raises:
        DataError: the file cannot be read, lacks an input column, or contains a value of the wrong type.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".npy": _read_npy}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unsupported suffix {path.suffix!r}; use .csv, .json or .npy")
    try:
        rows = reader(path, inputs)
    except Unreadable as error:
        raise DataError(f"{path} {error}") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a valid csv file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: invalid byte at offset {error.start}; convert the file to UTF-8"
        ) from error
    if not rows:
        raise DataError(f"{path} contains no rows")
    return rows


def _content(path: Path) -> bytes:
    return read_file(path, MAX_INPUT_BYTES)


def _read_csv(path: Path, inputs: Sequence[Tensor]) -> list[Row]:
    records = csv.DictReader(io.StringIO(_content(path).decode("utf-8-sig"), newline=""))
    _check_columns(path, records.fieldnames or (), inputs)
    if wide := [tensor.name for tensor in inputs if not tensor.is_scalar]:
        raise DataError(
            f"csv cannot represent inputs with several values per row: {', '.join(wide)}; use .json or .npy"
        )
    return [
        {tensor.name: _parse(path, number, tensor, record[tensor.name]) for tensor in inputs}
        for number, record in enumerate(records, start=2)
    ]


def _parse(path: Path, line: int, tensor: Tensor, text: str | None) -> Any:
    if tensor.datatype == "BYTES":
        return text or ""
    if text is None or not text.strip():
        return None
    try:
        return float(text) if tensor.datatype.startswith(("FP", "BF")) else int(text)
    except ValueError as error:
        raise DataError(f"{path}:{line}: {tensor.name} is {text!r:.100}, not a number ({tensor.datatype})") from error


def _read_json(path: Path, inputs: Sequence[Tensor]) -> list[Row]:
    try:
        rows = read_json(_content(path).decode())
    except Malformed as error:
        raise DataError(f"{path} {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: expected a list of objects, such as [{{"{inputs[0].name}": …}}]')
    for row in rows:
        _check_columns(path, row, inputs)
    return [{tensor.name: row[tensor.name] for tensor in inputs} for row in rows]


def _read_npy(path: Path, inputs: Sequence[Tensor]) -> list[Row]:
    from maas_ray.foreign.npy import read_npy  # late: importing numpy is slow

    if len(inputs) != 1:
        names = ", ".join(tensor.name for tensor in inputs)
        raise DataError(f"{path}: .npy needs a model with one input; this model has {len(inputs)}: {names}; use .json")
    (tensor,) = inputs
    try:
        array = read_npy("it", _content(path))
    except DataError as error:
        raise DataError(f"{path} is not an .npy file of plain numbers: {error}") from error
    if array.ndim == 0 or array[0].size != prod(tensor.shape):
        needed = ", ".join(map(str, tensor.shape))
        raise DataError(f"{path} has shape {list(array.shape)}; input {tensor.name} needs [rows, {needed}]")
    return [{tensor.name: row.ravel().tolist()} for row in array]


def _check_columns(path: Path, names: Any, inputs: Sequence[Tensor]) -> None:
    if missing := [tensor.name for tensor in inputs if tensor.name not in names]:
        raise DataError(f"{path} lacks {', '.join(missing)}, required by the model; columns found: {_listed(names)}")


def _listed(names: Any) -> str:
    found = [str(name)[:100] for name in names]
    return ", ".join(found[:50]) + (f" and {len(found) - 50} more" if len(found) > 50 else "")
