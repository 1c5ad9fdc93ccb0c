"""Divides many files into units of work, and reads the rows of a unit in blocks. Independent of cleaning and Ray.

A unit is a range of consecutive rows: row groups of parquet files, images, or whole files of other formats. The units
depend on the files alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from maas_ray.data.large.footers import read_footers
from maas_ray.data.sources.arrays import tensor_shape
from maas_ray.data.sources.bounds import allowed_bytes, too_much
from maas_ray.data.sources.csv_file import open_csv, read_header
from maas_ray.data.sources.files import File, filesystem
from maas_ray.data.sources.images import COLUMN, image_shape, read_images
from maas_ray.data.sources.partitions import add_partitions, partition_fields, root_of
from maas_ray.data.sources.table import (
    choose_columns,
    find_index_columns,
    read_arrow,
    read_jsonl,
    refuse_empty,
    refuse_other_columns,
)
from maas_ray.data.sources.vectors import is_list, vectors_in
from maas_ray.data.spec.data import DataSpec, Format
from maas_ray.errors import DataError

FORMATS = ("parquet", "csv", "arrow", "jsonl", "images")
UNIT_BYTES = 1 << 27
"""Minimum uncompressed bytes of a unit, if the files have that many; a single row group or file may be larger."""
BLOCK_BYTES = 1 << 25
"""Raw bytes that a task processes at once."""
MAX_BLOCK_ROWS = 1 << 16
MAX_WHOLE_BYTES = 1 << 30
"""Largest file of a format that can only be read as a whole."""
_TEXT_BYTES = 32  # estimated width of a text
_PATH = b"path"
"""Metadata key of a surveyed schema for the path of its file."""


@dataclass(frozen=True)
class TablePiece:
    """A part of one file."""

    path: str
    first: int = 0
    stop: int | None = None
    """Row groups [first, stop) of a parquet file, or the one row of an image; None: the whole file."""


@dataclass(frozen=True)
class UnitSource:
    """The source to read; any process can read it."""

    spec: DataSpec
    kind: Format
    names: tuple[str, ...]
    """The columns that the spec uses, in order."""
    schema: pa.Schema | None
    """Schema of all files; None: not known yet."""
    units: tuple[tuple[TablePiece, ...], ...]
    num_rows: tuple[int, ...] | None
    """Rows of each unit; None: not known yet."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """See `RawTable`."""
    root: str = ""
    """See `partition_fields`."""
    partitions: tuple[pa.Field, ...] = ()
    """The columns in the paths of the files."""

    @property
    def is_typed(self) -> bool:
        """Whether the format has types; csv has none, and all its columns are text."""
        return self.kind != "csv"

    def name_of(self, unit: int) -> str:
        """Name of a unit in messages: its file, or the first and the last of its files."""
        paths = list(dict.fromkeys(piece.path for piece in self.units[unit]))
        return repr(paths[0]) if len(paths) == 1 else f"{paths[0]!r} to {paths[-1]!r}"

    def field(self, name: str) -> pa.Field:
        """Name and type of a column over all files.

        Raises:
            DataError: no file has been read yet.
        """
        if self.schema is None:
            raise DataError(f"the types of {self.spec.uri} are not known yet")
        return self.schema.field(name)


@dataclass
class _Head:
    """The information in the header or footer of a file."""

    names: list[str]
    schema: pa.Schema | None = None
    chunks: list[tuple[int | None, int]] = field(default_factory=list)
    """Rows (None: not known) and bytes of each piece that can be read by itself."""


def open_source(spec: DataSpec, files: Sequence[File], kind: Format) -> UnitSource:
    """Opens the files without reading their rows.

    Raises:
        DataError: a file is empty or not in its format, the files do not fit together, or a column does not exist.
    """
    system, _ = filesystem(spec, spec.uri)
    if kind == "csv":  # the other files' headers are read with their rows
        heads = [_csv_head(spec, system, file, is_first=file is files[0]) for file in files]
    elif kind == "jsonl":
        heads = [_whole_head(file) for file in files]
    elif kind == "images":
        heads = _image_heads(spec, system, files)
    else:
        heads = _native_heads(spec, system, files, kind)
    root, paths = root_of(filesystem(spec, spec.uri)[1]), [file.path for file in files]
    partitions = partition_fields(root, paths, kind != "csv") if kind != "images" else []
    for head in heads:
        if head.names:
            own = [one for one in partitions if one.name not in head.names]
            head.names = [*head.names, *(one.name for one in own)]
            if head.schema is not None:
                head.schema = pa.schema([*head.schema, *own])
    first = heads[0].names
    names = tuple(choose_columns(spec, first, files[0].path)) if first else ()
    schemas = []
    for file, head in zip(files, heads, strict=True):
        if head.names:
            refuse_other_columns(choose_columns(spec, head.names, file.path), file.path, names, files[0].path)
        if head.schema is not None:
            schemas.append(pa.schema([head.schema.field(name) for name in names]))
    if any(is_list(one.type) for schema in schemas for one in schema):
        schemas = []  # the length of vectors is in the rows
    units, num_rows = _cut(files, heads)
    if not units:
        raise DataError(f"{spec.uri} has columns but no rows")
    is_counted = all(rows is not None for rows in num_rows)
    return UnitSource(
        spec,
        kind,
        names,
        unite_schemas(spec, schemas) if schemas else None,
        tuple(units),
        tuple(rows or 0 for rows in num_rows) if is_counted else None,
        find_index_columns(spec, first),
        root,
        tuple(partitions),
    )


def with_types(source: UnitSource, schemas: Sequence[pa.Schema]) -> UnitSource:
    """The source with the columns and types of all of its units, in order."""
    ordered = in_order(schemas)
    united = unite_schemas(source.spec, ordered).remove_metadata()
    return replace(source, names=tuple(ordered[0].names), schema=united)


def in_order(schemas: Sequence[pa.Schema]) -> list[pa.Schema]:
    """Surveyed schemas, with their columns in the order of the first schema.

    Raises:
        DataError: they do not have the same columns.
    """
    first = schemas[0]
    for schema in schemas:
        path, other = (one.metadata[_PATH].decode() for one in (schema, first))
        refuse_other_columns(schema.names, path, first.names, other)
    return [pa.schema([schema.field(name) for name in first.names], schema.metadata) for schema in schemas]


def unite_schemas(spec: DataSpec, schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The schema whose types can represent the values of all files.

    Raises:
        DataError: a column has types that do not fit together.
    """
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the files of {spec.uri} do not fit together: {error}") from error


def read_blocks(source: UnitSource, unit: int) -> Iterator[pa.Table]:
    """The rows of a unit in order, as many at a time as fit into `BLOCK_BYTES`.

    Raises:
        DataError: a file cannot be read, or does not fit the others.
    """
    system, _ = filesystem(source.spec, source.spec.uri)
    rows = _block_rows(source.schema)
    if source.kind == "images":
        paths = [piece.path for piece in source.units[unit]]
        shape = tensor_shape(source.field(COLUMN)) or ()
        for start in range(0, len(paths), rows):
            yield read_images(source.spec, system, paths[start : start + rows], shape).select(list(source.names))
        return
    for piece in source.units[unit]:
        for table in _read_piece(source, system, piece, rows):
            fitting = _fit_types(source, piece, table)
            for start in range(0, fitting.num_rows, rows):
                yield fitting.slice(start, rows)


def _read_piece(source: UnitSource, system: Any, piece: TablePiece, rows: int) -> Iterator[pa.Table]:
    if source.kind == "parquet":
        yield from _read_row_groups(source, system, piece, rows)
    elif source.kind == "csv":
        yield from _read_csv(source, system, piece.path)
    elif source.kind == "arrow":
        yield from _read_batches(source, system, piece.path)
    else:
        yield read_jsonl(source.spec, system, piece.path)


def _fit_types(source: UnitSource, piece: TablePiece, table: pa.Table) -> pa.Table:
    table = add_partitions(table, source.root, piece.path, source.partitions)
    names = choose_columns(source.spec, table.column_names, piece.path)
    if source.names:
        refuse_other_columns(names, piece.path, source.names, source.units[0][0].path)
    table = vectors_in(table.select(list(source.names) or names), piece.path)
    if source.schema is None:
        # Survey: the types of all files are not known yet.
        return table.replace_schema_metadata({_PATH: piece.path})
    if table.schema == source.schema:
        return table
    try:
        return pa.concat_tables([source.schema.empty_table(), table], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{piece.path} does not fit the other files of {source.spec.uri}: {error}") from error


def _read_row_groups(source: UnitSource, system: Any, piece: TablePiece, rows: int) -> Iterator[pa.Table]:
    try:
        with system.open_input_file(piece.path) as opened:
            reader = parquet.ParquetFile(opened)
            groups = range(piece.first, piece.stop if piece.stop is not None else reader.num_row_groups)
            size = opened.size()
            left = allowed_bytes(source.spec, size)
            in_file = set(reader.schema_arrow.names)
            columns = [name for name in source.names if name in in_file]
            for batch in reader.iter_batches(rows, row_groups=list(groups), columns=columns):
                left -= batch.nbytes
                if left < 0:
                    raise too_much(source.spec, piece.path, size)
                yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"cannot read {piece.path} as a parquet file: {error}") from error


def _read_csv(source: UnitSource, system: Any, path: str) -> Iterator[pa.Table]:
    with open_csv(source.spec, system, path) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _read_batches(source: UnitSource, system: Any, path: str) -> Iterator[pa.Table]:
    try:
        with system.open_input_file(path) as opened:
            reader = _open_arrow(opened)
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                for i in range(reader.num_record_batches):
                    yield _validated(reader.get_batch(i))
            elif reader is not None:
                for batch in reader:
                    yield _validated(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"cannot read {path} as an Arrow file: {error}") from error
    if reader is None:
        yield read_arrow(source.spec, system, path)


def _validated(batch: pa.RecordBatch) -> pa.Table:
    batch.validate(full=True)  # pyarrow trusts the offsets in a file, wherever they point
    return pa.Table.from_batches([batch])


def _open_arrow(opened: Any) -> Any:
    """A reader of the batches of an Arrow file or an Arrow stream; None: the file is neither."""
    for form in (pa.ipc.open_file, pa.ipc.open_stream):
        try:
            return form(opened)
        except pa.ArrowInvalid:
            opened.seek(0)
    return None


def _native_heads(spec: DataSpec, system: Any, files: Sequence[File], kind: Format) -> list[_Head]:
    for file in files:
        refuse_empty(file.path, file.size)
    heads = []
    for file, footer in zip(files, read_footers(spec, system, files, kind), strict=True):
        # None: Feather version 1, or damaged.
        schema = footer.schema if footer is not None else read_arrow(spec, system, _small(file).path).schema
        chunks: list[tuple[int | None, int]] = [(None, file.size)]
        if kind == "parquet" and footer is not None:
            chunks = list(footer.groups)
        heads.append(_Head(schema.names, schema, chunks))
    return heads


def _csv_head(spec: DataSpec, system: Any, file: File, *, is_first: bool) -> _Head:
    refuse_empty(file.path, file.size)
    head = _Head([], None, [(None, file.size)])
    if is_first:
        head.names = read_header(spec, system, file.path)
        head.schema = pa.schema([pa.field(name, pa.string()) for name in head.names])
    return head


def _image_heads(spec: DataSpec, system: Any, files: Sequence[File]) -> list[_Head]:
    """Every image is a row; only the first image is read."""
    shape = image_shape(spec, system, [file.path for file in files])
    schema = read_images(spec, system, [], shape).schema
    first = _Head(schema.names, schema, [(1, prod(shape))])
    return [first, *(_Head([], None, [(1, prod(shape))]) for _ in files[1:])]


def _whole_head(file: File) -> _Head:
    refuse_empty(file.path, file.size)
    return _Head([], None, [(None, _small(file).size)])


def _small(file: File) -> File:
    if file.size > MAX_WHOLE_BYTES:
        raise DataError(
            f"{file.path} has {file.size} bytes; the limit for this format, which is read as a whole, is "
            f"{MAX_WHOLE_BYTES} bytes; split it into several files, or convert it to parquet"
        )
    return file


def _cut(files: Sequence[File], heads: Sequence[_Head]) -> tuple[list[tuple[TablePiece, ...]], list[int | None]]:
    """The units and their rows."""
    units: list[tuple[TablePiece, ...]] = []
    counts: list[int | None] = []
    pieces: list[TablePiece] = []
    filled, num_rows = 0, 0
    is_counted = True

    def close() -> None:
        nonlocal filled, num_rows, is_counted
        units.append(tuple(pieces))
        counts.append(num_rows if is_counted else None)
        pieces.clear()
        filled, num_rows, is_counted = 0, 0, True

    for file, head in zip(files, heads, strict=True):
        for i, (rows, size) in enumerate(head.chunks):
            if pieces and filled + size > UNIT_BYTES:
                close()
            if rows is None:
                pieces.append(TablePiece(file.path))
                is_counted = False
            elif pieces and pieces[-1].path == file.path:
                pieces[-1] = replace(pieces[-1], stop=i + 1)
            else:
                pieces.append(TablePiece(file.path, i, i + 1))
            filled, num_rows = filled + size, num_rows + (rows or 0)
    if pieces:
        close()
    return units, counts


def _block_rows(schema: pa.Schema | None) -> int:
    if schema is None:
        return MAX_BLOCK_ROWS
    return max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES // max(1, sum(_width(field) for field in schema))))


def _width(field: pa.Field) -> int:
    """Approximate bytes of a value."""
    if tensor_shape(field) is not None:
        return int(field.type.list_size * field.type.value_type.bit_width // 8)
    try:
        return int(field.type.bit_width // 8) or 1
    except ValueError:
        return _TEXT_BYTES
