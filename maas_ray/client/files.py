"""Reads raw rows for a model from a file, as training read its data; needs pyarrow, but neither Ray nor torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.errors import DataError
from maas_ray.foreign.documents import Malformed, read_json
from maas_ray.foreign.files import Unreadable, read_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_INPUT_BYTES = 1 << 30
MAX_LISTED = 50
FILE_ROWS = 64
"""Rows of a file in one request."""
MAX_REQUEST_BYTES = 8 << 20
"""Maximum bytes of the rows of one request, if it has more than one row; servers accept 16 MiB by default."""

Row = dict[str, Any]


@dataclass(frozen=True)
class FileRows:
    """The rows of a file.

    Attributes:
        columns: values [rows, …] by input; objects of `bytes` or `str` for BYTES.
        names: file name of each row, for image files; empty for tables.
        num_unconvertible: per input, values that are no numbers, which training read as missing too.
    """

    columns: "Mapping[str, NDArray[Any]]"
    names: tuple[str, ...] = ()
    num_unconvertible: Mapping[str, int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batches(self, num_rows: int = FILE_ROWS) -> "Iterator[Mapping[str, NDArray[Any]]]":
        """At most `num_rows` rows at a time, and fewer of large rows."""
        start = 0
        while start < len(self):
            stop = min(start + num_rows, len(self))
            while stop > start + 1 and self._num_bytes(start, stop) > MAX_REQUEST_BYTES:
                stop = start + (stop - start) // 2
            yield {name: values[start:stop] for name, values in self.columns.items()}
            start = stop

    def _num_bytes(self, start: int, stop: int) -> int:
        return sum(
            sum(map(len, values[start:stop].ravel())) if values.dtype == object else values[start:stop].nbytes
            for values in self.columns.values()
        )


def read_input_file(path: Path, model: ModelDescription) -> FileRows:
    """Reads the input rows of a model; columns that are no inputs of it are ignored.

    Args:
        path: a file in a format that training reads (.csv, .csv.gz, .tsv, .parquet, .arrow, .jsonl, …), read with the
            options of the model's training data; `.json` with a list of objects; `.npy` with an array [rows, …] for a
            model with one input; for a model of images an image file, or a directory of them.
        model: description of the model.

    Raises:
        DataError: the file cannot be read, lacks an input column, contains a value of the wrong type, or has a missing
            value where the model has no replacement.
    """
    try:
        if not path.exists():
            raise DataError(f"{path} does not exist")
        if path.suffix.lower() == ".json":
            rows = FileRows(_columns(_read_json(path, model.inputs), model.inputs))
        elif path.suffix.lower() == ".npy":
            rows = _read_npy(path, model.inputs)
        else:
            from maas_ray.client.tables import read_table_file

            found = _find_images(path, model.inputs)
            rows = read_table_file(path, model) if found is None else found
    except Unreadable as error:
        raise DataError(f"{path} {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: invalid byte at offset {error.start}; convert the file to UTF-8"
        ) from error
    if not len(rows):
        raise DataError(f"{path} contains no rows")
    return rows


def _content(path: Path) -> bytes:
    return read_file(path, MAX_INPUT_BYTES)


def _find_images(path: Path, inputs: tuple[Tensor, ...]) -> FileRows | None:
    """Image files, as they are; None: `path` is no image file, and no directory with image files."""
    from maas_ray.data.sources.files import EXTENSIONS, extension_of

    def is_image(one: Path) -> bool:
        return EXTENSIONS.get(extension_of(one.name) or "") == "images" and not one.name.startswith((".", "_"))

    files = sorted(one for one in path.rglob("*") if is_image(one) and one.is_file()) if path.is_dir() else [path]
    if not files or not is_image(files[0]):
        return None
    if len(inputs) != 1 or inputs[0].encoding != "image":
        taken = ", ".join(f"{tensor.name} ({tensor.datatype})" for tensor in inputs)
        raise DataError(f"{path} is an image, but the model's inputs are {taken}; it does not decode image files")
    import numpy as np

    values = np.empty(len(files), dtype=object)
    for i, file in enumerate(files):
        values[i] = _content(file)
    names = tuple(str(file.relative_to(path)) if path.is_dir() else file.name for file in files)
    return FileRows({inputs[0].name: values}, names)


def _read_json(path: Path, inputs: tuple[Tensor, ...]) -> list[Row]:
    try:
        rows = read_json(_content(path).decode())
    except Malformed as error:
        raise DataError(f"{path} {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: expected a list of objects, such as [{{"{inputs[0].name}": …}}]')
    for row in rows:
        check_columns(path, row, inputs)
    return [{tensor.name: row[tensor.name] for tensor in inputs} for row in rows]


def _columns(rows: list[Row], inputs: tuple[Tensor, ...]) -> "dict[str, NDArray[Any]]":
    from maas_ray.client.messages import to_arrays

    arrays = to_arrays(inputs, rows) if rows else []
    return {tensor.name: array for tensor, (_, array) in zip(inputs, arrays, strict=False)}


def _read_npy(path: Path, inputs: tuple[Tensor, ...]) -> FileRows:
    from maas_ray.foreign.npy import read_npy  # late: importing numpy is slow

    if len(inputs) != 1:
        names = ", ".join(tensor.name for tensor in inputs)
        raise DataError(f"{path}: .npy needs a model with one input; this model has {len(inputs)}: {names}; use .json")
    (tensor,) = inputs
    try:
        array = read_npy("it", _content(path))
    except DataError as error:
        raise DataError(f"{path} is not an .npy file of plain numbers: {error}") from error
    if array.ndim == 0 or (len(array) and array[0].size != prod(tensor.shape)):
        needed = ", ".join(map(str, tensor.shape))
        raise DataError(f"{path} has shape {list(array.shape)}; input {tensor.name} needs [rows, {needed}]")
    return FileRows({tensor.name: array.reshape(len(array), *tensor.shape)})


def check_columns(path: Path, names: Any, inputs: tuple[Tensor, ...]) -> None:
    """Raises `DataError` if an input is not among the columns."""
    if missing := [tensor.name for tensor in inputs if tensor.name not in names]:
        found = [str(name)[:100] for name in names]
        more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        listed = ", ".join(found[:MAX_LISTED]) + more
        raise DataError(f"{path} lacks {', '.join(missing)}, required by the model; columns found: {listed}")
