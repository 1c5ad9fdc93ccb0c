"""Reads tables in formats with native parsers in a child process with limits.

An untrusted file may crash such a parser, keep it busy forever, or expand beyond any memory. The child returns a table
that it has fully validated and rewritten, so that no offset of the file reaches this process.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import feather, json, parquet

from maas_ray import confined
from maas_ray.data.sources.bounds import SMALL_BYTES, allowed_bytes, too_much
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import ConfinedError, ConfinedOutOfMemory, DataError

MAX_JSON_ROW_BYTES = 1 << 24
WALL_S = 600.0
CPU_S = 6.0
"""CPU time for a file that expands to 64 MiB; proportionally more for larger files."""
_SPARE_BYTES = 1 << 29
"""Memory of the parsers in addition to the table and its copy."""

NAMES = {"parquet": "a parquet file", "arrow": "an Arrow file", "jsonl": "a file of JSON lines"}

Payload = Mapping[str, Any]


def read_native(spec: DataSpec, path: str, kind: str, data: bytes) -> pa.Table:
    """Reads one file.

    Args:
        spec: contains the limit on its expanded size.
        path: path of the file, for messages.
        kind: `parquet`, `arrow` or `jsonl`.
        data: content of the file.

    Raises:
        DataError: it cannot be read, expands to too many bytes, or its parser crashes or takes too long.
    """
    allowed = allowed_bytes(spec, len(data))
    limits = confined.Limits(
        wall_s=WALL_S,
        cpu_s=CPU_S * allowed / SMALL_BYTES,
        memory_bytes=3 * allowed + len(data) + _SPARE_BYTES,
        answer_bytes=2 * allowed + SMALL_BYTES,
    )
    payload = {"path": path, "kind": kind, "allowed": allowed}
    try:
        answer = confined.call("maas_ray.data.sources.native:parse", payload, [data], limits, what=path)
    except ConfinedOutOfMemory as error:
        raise too_much(spec, path, len(data)) from error
    except ConfinedError as error:
        raise DataError(f"cannot read {path} as {NAMES[kind]}: {error}") from error
    if answer.payload["is_too_large"]:
        raise too_much(spec, path, len(data))
    return pa.ipc.open_stream(pa.py_buffer(answer.blobs[0])).read_all()


def parse(payload: Payload, blobs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The child's side: returns the table as an Arrow stream, or reports that it is too large.

    Raises:
        DataError: the file cannot be read.
    """
    pa.set_memory_pool(pa.system_memory_pool())  # other pools reserve memory that counts toward the limit
    read: dict[str, Callable[[Any, int], pa.Table | None]] = {"parquet": _parquet, "arrow": _arrow, "jsonl": _jsonl}
    try:
        table = read[payload["kind"]](pa.BufferReader(pa.py_buffer(blobs[0])), payload["allowed"])
        if table is None or table.nbytes > payload["allowed"]:
            return {"is_too_large": True}, []
        table.validate(full=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return {"is_too_large": False}, [memoryview(sink.getvalue())]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        if isinstance(error, pa.ArrowMemoryError):
            return {"is_too_large": True}, []
        text = (str(error).splitlines() or [type(error).__name__])[0]
        name = NAMES[payload["kind"]]
        raise DataError(f"cannot read {payload['path']} as {name}: {text[:500]}") from error


def parquet_bytes(num_rows: int, schema: pa.Schema) -> int:
    """Memory of the fixed-width values in a parquet file, computed from its footer alone: a lower bound."""
    width = sum(_width(field.type) for field in schema)
    return int(num_rows * width)


def _width(kind: pa.DataType) -> float:
    try:
        return float(kind.bit_width / 8)
    except ValueError:
        return 4.0 if not pa.types.is_nested(kind) else 0.0  # an offset at least


def _parquet(source: Any, allowed: int) -> pa.Table | None:
    file = parquet.ParquetFile(source)
    if parquet_bytes(file.metadata.num_rows, file.schema_arrow) > allowed:
        return None
    tables: list[pa.Table] = []
    for group in range(file.num_row_groups):
        tables.append(file.read_row_group(group))
        allowed -= tables[-1].nbytes
        if allowed < 0:
            return None
    return pa.concat_tables(tables) if tables else file.schema_arrow.empty_table()


def _arrow(source: Any, allowed: int) -> pa.Table | None:
    try:
        return feather.read_table(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()  # the streaming variant of the same format


def _jsonl(source: Any, allowed: int) -> pa.Table | None:
    return json.read_json(source, json.ReadOptions(block_size=MAX_JSON_ROW_BYTES))
