"""Reads raw rows for `maas-ray predict` from csv, json or npy, typed by the model's metadata."""

import csv
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from maas_ray.cli.client import Input
from maas_ray.errors import DataError

MAX_INPUT_BYTES = 1 << 30

Row = dict[str, Any]


def read_rows(path: Path, inputs: Sequence[Input]) -> list[Row]:
    """Reads rows that a model can take; columns that it does not know are left out.

    Args:
        path: `.csv` with a header (an empty numeric cell is a missing value), `.json` with a list of objects, or `.npy`
            with an array [N, …] for a model with one input.
        inputs: the model's inputs.

    Raises:
        DataError: the file cannot be read, lacks a column of the model, or holds a value of another type.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".npy": _read_npy}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; use .csv, .json or .npy")
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes; the limit is {MAX_INPUT_BYTES}; split the file")
        rows = reader(path, inputs)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}; convert it first") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _read_csv(path: Path, inputs: Sequence[Input]) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        records = csv.DictReader(file)
        _check_columns(path, records.fieldnames or (), inputs)
        if wide := [tensor.name for tensor in inputs if not tensor.is_scalar]:
            raise DataError(f"the inputs {', '.join(wide)} have several values per row; use .json or .npy")
        return [
            {tensor.name: _parse(path, number, tensor, record[tensor.name]) for tensor in inputs}
            for number, record in enumerate(records, start=2)
        ]


def _parse(path: Path, line: int, tensor: Input, text: str | None) -> Any:
    if tensor.datatype == "BYTES":
        return text or ""
    if text is None or not text.strip():
        return None
    try:
        return float(text) if tensor.datatype.startswith(("FP", "BF")) else int(text)
    except ValueError as error:
        raise DataError(f"{path}:{line}: {tensor.name} is {text!r}, not a number ({tensor.datatype})") from error


def _read_json(path: Path, inputs: Sequence[Input]) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: expected a list of objects, such as [{{"{inputs[0].name}": …}}]')
    for row in rows:
        _check_columns(path, row, inputs)
    return [{tensor.name: row[tensor.name] for tensor in inputs} for row in rows]


def _read_npy(path: Path, inputs: Sequence[Input]) -> list[Row]:
    import numpy as np

    if len(inputs) != 1:
        names = ", ".join(tensor.name for tensor in inputs)
        raise DataError(f"{path}: an array fits a model with one input; this one has {len(inputs)}: {names}")
    (tensor,) = inputs
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is not an .npy file with plain numbers: {error}") from error
    if array.ndim == 0 or array[0].size != prod(tensor.shape):
        raise DataError(
            f"{path} has shape {list(array.shape)}; {tensor.name} needs [rows, {', '.join(map(str, tensor.shape))}]"
        )
    return [{tensor.name: row.ravel().tolist()} for row in array]


def _check_columns(path: Path, names: Any, inputs: Sequence[Input]) -> None:
    if missing := [tensor.name for tensor in inputs if tensor.name not in names]:
        raise DataError(f"{path} lacks {', '.join(missing)}, which the model needs; it has: {', '.join(names)}")
