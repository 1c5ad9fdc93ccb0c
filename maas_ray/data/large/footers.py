"""Reads the schemas and row groups of parquet and Arrow files, parsed in a child process with limits.

This process reads a few bytes of each file and parses none of them: a crafted footer may crash a native parser, or make
it reserve any amount of memory. Many files share a child; if it dies, they are parsed one by one to identify the file.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from maas_ray import confined
from maas_ray.data.sources.bounds import allowed_bytes, too_much
from maas_ray.data.sources.files import File
from maas_ray.data.sources.native import NAMES, parquet_bytes
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import ConfinedError, DataError

MAX_FOOTER_BYTES = 64 << 20
"""Largest footer or schema that is parsed."""
_TOGETHER_BYTES = 16 << 20
_TOGETHER_FILES = 16
"""Maximum number of files that one child parses and that are read at a time."""
_MAGIC = b"PAR1"
_ARROW_MAGIC = b"ARROW1\0\0"
_SPARE_BYTES = 1 << 29
_FACTOR = 64
"""Memory that a parsed footer may take, as a multiple of its bytes."""

Payload = Mapping[str, Any]


@dataclass(frozen=True)
class Footer:
    """The schema and the row groups of one file."""

    schema: pa.Schema
    groups: tuple[tuple[int, int], ...]
    """Rows and bytes of each row group; empty for Arrow files, which do not contain them."""


def read_footers(spec: DataSpec, system: Any, files: Sequence[File], kind: str) -> list[Footer | None]:
    """Parses the footers of all files.

    Args:
        spec: contains the limit on a file's expanded size.
        system: filesystem of the files.
        files: files with at least one byte each.
        kind: `parquet` or `arrow`.

    Returns:
        In the order of the files; None for a Feather file of version 1, or a file that is not an Arrow file.

    Raises:
        DataError: a file cannot be read, is not in its format, or expands to too many bytes; or its parser crashes.
    """
    read = _parquet_bytes if kind == "parquet" else _arrow_bytes
    found: list[Footer | None] = []
    with ThreadPoolExecutor(_TOGETHER_FILES) as pool:
        for start in range(0, len(files), _TOGETHER_FILES):  # bounds the footers in this process's memory
            paths = [file.path for file in files[start : start + _TOGETHER_FILES]]
            footers = list(pool.map(lambda path: read(system, path), paths))
            for batch in _batches(footers):
                found += _parse_batch(kind, [paths[i] for i in batch], [footers[i] for i in batch])
    for file, footer in zip(files, found, strict=True):
        if footer is not None and kind == "parquet":
            num_rows = sum(rows for rows, _ in footer.groups)
            if parquet_bytes(num_rows, footer.schema) > allowed_bytes(spec, file.size):
                raise too_much(spec, file.path, file.size)
    return found


def parse(payload: Payload, blobs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The child's side: for each file its row groups, or None, and its schema in Arrow's serialized form.

    Raises:
        DataError: a file is not in its format.
    """
    pa.set_memory_pool(pa.system_memory_pool())  # other pools reserve memory that counts toward the limit
    groups: list[list[tuple[int, int]] | None] = []
    schemas: list[Any] = []
    for path, blob in zip(payload["paths"], blobs, strict=True):
        buffer = pa.BufferReader(pa.py_buffer(blob))
        try:
            if payload["kind"] == "parquet":
                file = parquet.ParquetFile(buffer)
                found = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
                groups.append([(group.num_rows, group.total_byte_size) for group in found])
                schemas.append(memoryview(file.schema_arrow.serialize()))
            else:
                schemas.append(memoryview(pa.ipc.read_schema(buffer).serialize()))
                groups.append([])
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            if payload["kind"] == "arrow":
                groups.append(None)
                schemas.append(b"")
                continue
            raise _unreadable("parquet", path, error) from error
    return {"groups": groups}, schemas


def _parse_batch(kind: str, paths: Sequence[str], footers: Sequence[bytes]) -> list[Footer | None]:
    try:
        return _parse_apart(kind, paths, footers)
    except ConfinedError as error:
        if len(paths) == 1:
            raise _unreadable(kind, paths[0], error) from error
    return [one for path, footer in zip(paths, footers, strict=True) for one in _parse_batch(kind, [path], [footer])]


def _parse_apart(kind: str, paths: Sequence[str], footers: Sequence[bytes]) -> list[Footer | None]:
    num_bytes = sum(map(len, footers))
    limits = confined.Limits(
        wall_s=120.0,
        cpu_s=30.0,
        memory_bytes=_SPARE_BYTES + _FACTOR * num_bytes,
        answer_bytes=_TOGETHER_BYTES + _FACTOR * num_bytes,
    )
    what = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    answer = confined.call(f"{__name__}:parse", {"kind": kind, "paths": list(paths)}, footers, limits, what=what)
    return [
        None if groups is None else Footer(_schema(schema), tuple((rows, size) for rows, size in groups))
        for groups, schema in zip(answer.payload["groups"], answer.blobs, strict=True)
    ]


def _schema(serialized: Any) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(serialized))


def _batches(footers: Sequence[bytes]) -> Iterator[list[int]]:
    batch: list[int] = []
    num_bytes = 0
    for number, footer in enumerate(footers):
        if batch and num_bytes + len(footer) > _TOGETHER_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(number)
        num_bytes += len(footer)
    if batch:
        yield batch


def _parquet_bytes(system: Any, path: str) -> bytes:
    """The file without its data: https://parquet.apache.org/docs/file-format (magic, data, footer, length, magic)."""
    try:
        with system.open_input_file(path) as opened:
            size = opened.size()
            opened.seek(max(0, size - 8))
            tail = bytes(opened.read(8))
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != _MAGIC or length > size - 12:
                raise _unreadable("parquet", path, "it does not end in a footer")
            if length > MAX_FOOTER_BYTES:
                raise _unreadable(
                    "parquet", path,
                    f"its footer has {length} bytes, the limit is {MAX_FOOTER_BYTES}; write fewer columns or larger row groups",
                )  # fmt: skip
            opened.seek(size - 8 - length)
            return _MAGIC + bytes(opened.read(length)) + tail
    except OSError as error:
        raise _unreadable("parquet", path, error) from error


def _arrow_bytes(system: Any, path: str) -> bytes:
    """The schema at the file's start: https://arrow.apache.org/docs/format/Columnar.html (encapsulated message)."""
    try:
        with system.open_input_stream(path) as opened:
            start = bytes(opened.read(8))
            if start == _ARROW_MAGIC:
                start = bytes(opened.read(8))
            length = int.from_bytes(start[4:], "little")
            if start[:4] != b"\xff\xff\xff\xff" or length > MAX_FOOTER_BYTES:
                return start
            return start + bytes(opened.read(length))
    except OSError as error:
        raise _unreadable("arrow", path, error) from error


def _unreadable(kind: str, path: str, why: object) -> DataError:
    return DataError(f"cannot read {path} as {NAMES[kind]}: {why}")
