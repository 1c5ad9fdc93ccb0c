"""Reads a data set of any format into one Arrow table, without cleaning or conversion.

csv columns are read as text (types are decided over the whole column, not over the first rows); a tensor per row is a
fixed-size list whose field contains the shape, see `arrays.tensor_field`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from maas_ray.data.sources.arrays import read_idx, read_numpy, read_sklearn
from maas_ray.data.sources.bounds import refuse_many_columns
from maas_ray.data.sources.csv_file import read_csv
from maas_ray.data.sources.files import filesystem, format_of, list_files, open_stream
from maas_ray.data.sources.images import image_shape, read_images
from maas_ray.data.sources.native import read_native
from maas_ray.data.sources.partitions import add_partitions, partition_fields, root_of
from maas_ray.data.sources.vectors import vectors_in
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from maas_ray.suggestions import did_you_mean

SKLEARN = "sklearn:"
_UNNAMED = re.compile(r"|Unnamed: \d+(\.\d+)*")
"""Names of a column without a name; pandas reads it back as the latter."""
_INDEX = re.compile(r"__index_level_\d+__")
MAX_LISTED = 50
"""Maximum number of names that a message lists."""


@dataclass(frozen=True)
class RawTable:
    """A table of the features in order, the target, then the columns of the split and the weight."""

    table: pa.Table
    is_typed: bool
    """Whether the format has types; csv has none, and all its columns are text."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Columns and files that are not read although the spec does not exclude them, and why."""


def read_table(spec: DataSpec, paths: list[str] | None = None) -> RawTable:
    """All rows of the columns that the spec uses, in the order of the files and their rows.

    Args:
        spec: the data specification.
        paths: the files that its URI names, if they are known.

    Raises:
        DataError: a file is missing, empty, not in its format or not UTF-8; files do not fit together; a column in
            the spec does not exist (the message names the nearest existing one).
    """
    if spec.uri.startswith(SKLEARN):
        return RawTable(_select(spec, read_sklearn(spec.uri.removeprefix(SKLEARN), spec.target), spec.uri), True)
    paths = paths if paths is not None else [file.path for file in list_files(spec)]
    kind = format_of(spec, paths)
    if kind == "sklearn":
        raise DataError(f"data.uri {spec.uri!r} names no scikit-learn data set; use for example sklearn:digits")
    if kind == "text":
        raise DataError(f"{spec.uri} is plain text without columns; the task {spec.task} needs a table")
    if kind in ("numpy", "idx"):
        if len(paths) > 1:
            raise DataError(f"{spec.uri} names {len(paths)} files; the format {kind} takes one file (and labels_uri)")
        table = read_numpy(spec) if kind == "numpy" else read_idx(spec)
        return RawTable(_select(spec, table, spec.uri), True)
    files, _ = filesystem(spec, spec.uri)
    if kind == "images":
        table = read_images(spec, files, paths, image_shape(spec, files, paths))
        return RawTable(_select(spec, table, spec.uri), True)
    names: list[str] = []

    def select(table: pa.Table, path: str) -> pa.Table:
        names.extend([] if names else table.column_names)
        return _select(spec, table, path)

    table = read_files(spec, paths, select)
    return RawTable(table, is_typed=kind != "csv", left_out=find_index_columns(spec, names))


def read_files(spec: DataSpec, paths: list[str], select: Callable[[pa.Table, str], pa.Table]) -> pa.Table:
    """All rows of files with columns, in order.

    Args:
        spec: names the files and how they are read.
        paths: their paths.
        select: returns the columns to keep of the table of a file, given with the file's path.

    Raises:
        DataError: as `read_table`.
    """
    kind = format_of(spec, paths)
    if kind == "numpy":
        return select(read_numpy(spec), spec.uri)
    readers = {"csv": read_csv, "parquet": _read_native("parquet"), "arrow": read_arrow, "jsonl": read_jsonl}
    if kind not in readers:
        raise DataError(f"{spec.uri} is {kind}, which has no columns; use one of {', '.join(readers)}, numpy")
    files, _ = filesystem(spec, spec.uri)
    tables: list[pa.Table] = []
    root = root_of(filesystem(spec, spec.uri)[1])
    partitions = partition_fields(root, paths, kind != "csv")
    for path in paths:
        whole = add_partitions(readers[kind](spec, files, path), root, path, partitions)
        tables.append(vectors_in(select(whole, path), path))
        refuse_other_columns(tables[-1].column_names, path, tables[0].column_names, paths[0])
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the files of {spec.uri} do not fit together: {error}") from error
    if not joined.num_rows:
        raise DataError(f"{spec.uri} has columns but no rows")
    return joined


def _select(spec: DataSpec, table: pa.Table, where: str) -> pa.Table:
    return table.select(choose_columns(spec, table.column_names, where))


def choose_columns(spec: DataSpec, names: list[str], where: str) -> list[str]:
    """The columns that the spec uses: the features in order, the target, then the columns of the split and the weight.

    Raises:
        DataError: a column in the spec does not exist, or several columns have the same name.
    """
    refuse_many_columns(names, where)
    if repeated := sorted(name for name, number in Counter(names).items() if number > 1):
        raise DataError(f"{where} has several columns named {_listed(map(repr, repeated))}; rename them")
    unused = {spec.target, spec.split.column, spec.weight, *spec.split.other_columns, *spec.cleaning.drop}
    for name in (unused | {spec.split.key(spec.target)}) - {None}:
        require_column(name, names, where)
    unused |= set(find_index_columns(spec, names))
    chosen = spec.features if spec.features is not None else [name for name in names if name not in unused]
    if "" in chosen:
        place = names.index("") + 1
        raise DataError(
            f"{where}: column {place} of {len(names)} has no name; name it, or select others with data.features"
        )
    features = [name for name in chosen if name not in spec.cleaning.drop]
    if not features:
        raise DataError(f"{where} has no column left to predict {spec.target!r} from; its columns: {_listed(names)}")
    for name in spec.features or ():
        require_column(name, names, where)
    for name in spec.cleaning.columns:
        require_column(name, features, f"cleaning.columns: among its features {where}")
    extra = (spec.split.column, spec.split.key(spec.target), spec.weight)
    chosen = [*features, spec.target]
    return chosen + [name for name in dict.fromkeys(extra) if name is not None and name not in chosen]


def find_index_columns(spec: DataSpec, names: Iterable[str]) -> dict[str, str]:
    """The columns that number or name the rows, by the names that pandas and R give them, and why they are not read.

    Columns that the spec names are read.
    """
    named = {spec.target, spec.split.column, spec.weight, spec.split.key(spec.target), *(spec.features or ())}
    found: dict[str, str] = {}
    is_leading = True
    for name in names:
        is_leading = is_leading and _UNNAMED.fullmatch(name) is not None
        if name in named:
            continue
        if is_leading:
            found[name] = "the first column has no name: row names of pandas or R"
        elif _INDEX.fullmatch(name):
            found[name] = "an index of pandas"
    return found


def refuse_other_columns(names: Iterable[str], path: str, first_names: Iterable[str], first: str) -> None:
    """Rejects a file whose columns differ from those of the first one.

    Raises:
        DataError: the columns differ; the message lists the columns that only one file has.
    """
    if different := set(names) ^ set(first_names):
        raise DataError(
            f"{path} and {first} do not have the same columns: only one of them has "
            f"{_listed(sorted(different))}; name the columns to use with data.features"
        )


def require_column(name: Any, names: Iterable[str], where: str) -> None:
    """Rejects a column that does not exist.

    Raises:
        DataError: there is no such column; the message contains the nearest name, or all names if none is near.
    """
    known = list(names)
    if name in known:
        return
    hint = did_you_mean(str(name), known, f"the columns: {_listed(known)}")
    raise DataError(f"{where} has no column {name!r}; {hint}{_reading_hint(str(name), known)}")


def _reading_hint(name: str, known: list[str]) -> str:
    """How the file should be read instead, if its header shows that."""
    if len(known) == 1:
        for delimiter in (";", "\t", "|", ","):
            parts = {part.strip().strip("\"'") for part in known[0].split(delimiter)}
            if len(parts) > 1 and name.strip("\"'") in parts:
                return f"; set data.delimiter: {delimiter!r}"
    if name in (one.strip() for one in known):
        return "; set data.skip_initial_space: true if the values of the file are separated by a comma and a space"
    return ""


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return ", ".join(name[:100] for name in found[:MAX_LISTED]) + more


def _read_native(kind: str) -> Callable[[DataSpec, Any, str], pa.Table]:
    def read(spec: DataSpec, files: Any, path: str) -> pa.Table:
        try:
            with open_stream(spec, files, path) as stream:
                data = stream.read()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        refuse_empty(path, len(data))
        return read_native(spec, path, kind, data)

    return read


read_arrow = _read_native("arrow")
"""Reads one file in either variant of Arrow's format, or in Feather. Raises `DataError`."""
read_jsonl = _read_native("jsonl")
"""Reads one file of JSON lines. Raises `DataError`."""


def refuse_empty(path: str, size: int) -> None:
    """Raises `DataError` for an empty file."""
    if not size:
        raise DataError(f"{path} is empty")
