"""Columns in the paths of files: `year=2024/month=3/part-0.parquet`, as Hive writes them. Independent of file contents."""

from collections.abc import Sequence
from urllib.parse import unquote

import pyarrow as pa

from maas_ray.errors import DataError

_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
SIGNS = "*?["


def is_partition(name: str) -> bool:
    """Whether the name of a folder contains a column and its value."""
    return "=" in name[1:]


def partition_fields(root: str, paths: Sequence[str], is_typed: bool) -> list[pa.Field]:
    """The columns in the folders below `root`, in their order: int64 where every value is a whole number, else text.

    Args:
        root: path of the data without its glob.
        paths: paths of all files.
        is_typed: False: as text, as all columns of the format.

    Raises:
        DataError: files have different columns in their paths.
    """
    first = list(partition_values(root, paths[0])) if paths else []
    found: dict[str, list[str]] = {name: [] for name in first}
    for path in paths:
        values = partition_values(root, path)
        if list(values) != first:
            raise DataError(
                f"{path} and {paths[0]} have different partition columns, {', '.join(values) or 'none'} and "
                f"{', '.join(first) or 'none'}; select files of one layout with a glob"
            )
        for name, value in values.items():
            if value is not None:
                found[name].append(value)
    return [pa.field(name, _type(values) if is_typed else pa.string()) for name, values in found.items()]


def partition_values(root: str, path: str) -> dict[str, str | None]:
    """The columns and values in the folders of a file below `root`."""
    folders = path.removeprefix(root.rstrip("/")).split("/")[:-1]
    values: dict[str, str | None] = {}
    for folder in filter(is_partition, folders):
        name, _, value = folder.partition("=")
        values[unquote(name)] = None if value == _NO_VALUE else unquote(value)
    return values


def add_partitions(table: pa.Table, root: str, path: str, fields: Sequence[pa.Field]) -> pa.Table:
    """The rows of a file with the columns of its path; a column that the file itself contains is kept.

    Args:
        table: the rows.
        root: see `partition_fields`.
        path: path of the file.
        fields: see `partition_fields`.
    """
    values = partition_values(root, path)
    for field in fields:
        if field.name not in table.column_names:
            value = values.get(field.name)
            plain = int(value) if value is not None and pa.types.is_integer(field.type) else value
            table = table.append_column(field, pa.array([plain] * table.num_rows, field.type))
    return table


def root_of(path: str) -> str:
    """The path up to its first folder with a sign of a glob, or itself."""
    parts = path.split("/")
    place = next((i for i, part in enumerate(parts) if any(sign in part for sign in SIGNS)), len(parts))
    return "/".join(parts[:place])


def _type(values: Sequence[str]) -> pa.DataType:
    is_whole = (
        bool(values) and all(str(int(one)) == one for one in values if _is_digits(one)) and all(map(_is_digits, values))
    )
    return pa.int64() if is_whole else pa.string()


def _is_digits(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 19
