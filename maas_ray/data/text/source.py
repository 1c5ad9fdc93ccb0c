"""Reads the documents that a data URI names in pieces that fit into memory. Independent of tokenizers.

A piece ends with its document, or where GPT-2's pattern splits too: after a single newline, before the next word. So
the pieces of a document have the tokens of the whole document, unless a long range of it has no such position.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from maas_ray.data.sources.bounds import allowed_bytes, too_much
from maas_ray.data.sources.files import filesystem, format_of, list_files, open_stream
from maas_ray.data.sources.table import require_column
from maas_ray.data.spec.data import TEXT_FORMATS, DataSpec
from maas_ray.data.spec.text import TextSpec
from maas_ray.errors import DataError
from maas_ray.foreign.documents import Malformed, read_json

PIECE = 1 << 16
"""Maximum characters of a piece."""
BLOCK_BYTES = 1 << 20
"""Bytes per read."""
_MAX_LINE_BYTES = 1 << 28
_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class TextPiece:
    """Consecutive characters of a document."""

    text: str
    ends_document: bool


def read_pieces(spec: DataSpec, text: TextSpec) -> Iterator[TextPiece]:
    """All documents of all files, in the order of the files; empty documents are dropped.

    Raises:
        DataError: a file is missing or not UTF-8, does not have the field, or its format contains no texts.
    """
    paths = [file.path for file in list_files(spec)]
    kind = format_of(spec, paths)
    if kind not in TEXT_FORMATS:
        raise DataError(f"{spec.uri} is {kind}; the task {spec.task} reads {', '.join(TEXT_FORMATS)}")
    files, _ = filesystem(spec, spec.uri)
    for path in paths:
        try:
            if kind == "text":
                yield from _cut_documents(_characters(spec, files, path), text.separator)
            else:
                documents = (
                    _json_texts(spec, files, path, text.field)
                    if kind == "jsonl"
                    else _parquet_texts(spec, files, path, text)
                )
                for document in documents:
                    yield from _cut_documents(iter((document,)), None)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read {path}: {error}") from error


def _characters(spec: DataSpec, files: Any, path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with open_stream(spec, files, path) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8 ({error}); convert it, for instance with iconv -t UTF-8"
        ) from error


def _cut_documents(blocks: Iterable[str], separator: str | None) -> Iterator[TextPiece]:
    """Cuts the documents in a stream of characters into pieces. The last piece of a document may be empty."""
    width = len(separator or "")
    waiting, has_begun = "", False
    for block in blocks:
        waiting, start = waiting + block, 0
        while True:
            place = waiting.find(separator, start, start + PIECE + width + 1) if separator else -1
            if place >= 0:
                if has_begun or place > start:
                    yield TextPiece(waiting[start:place], ends_document=True)
                start, has_begun = place + width, False
            elif len(waiting) - start > PIECE + width + 1:  # does not cut a separator that is incomplete so far
                cut = _last_cut(waiting, start)
                yield TextPiece(waiting[start:cut], ends_document=False)
                start, has_begun = cut, True
            else:
                break
        waiting = waiting[start:]
    if has_begun or waiting:
        yield TextPiece(waiting, ends_document=True)


def _last_cut(waiting: str, start: int) -> int:
    end = start + PIECE
    while (end := waiting.rfind("\n", start, end)) > start:
        if _CUT.match(waiting, end + 1):
            return end + 1
    return start + PIECE


def _json_texts(spec: DataSpec, files: Any, path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(spec, files, path), start=1):
        if not line.strip():
            continue
        try:
            record = read_json(line)
        except Malformed as error:
            raise DataError(f"{path}, line {number} {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is a {type(record).__name__}; expected an object with {field!r}")
        require_column(field, record, f"{path}, line {number}")
        if not isinstance(record[field], str):
            raise DataError(f"{path}, line {number}: {field!r} is {record[field]!r:.40}; expected a string")
        yield record[field]


def _lines(spec: DataSpec, files: Any, path: str) -> Iterator[str]:
    waiting = ""
    for block in _characters(spec, files, path):
        *whole, waiting = (waiting + block).split("\n")
        yield from whole
        if len(waiting) > _MAX_LINE_BYTES:
            raise DataError(
                f"{path} has a line of more than {_MAX_LINE_BYTES} characters, the limit for JSON lines; split the line"
            )
    yield waiting


def _parquet_texts(spec: DataSpec, files: Any, path: str, text: TextSpec) -> Iterator[str]:
    with files.open_input_file(path) as source:
        size = source.size()
        # Repeated texts remain references to a dictionary: an expanded batch of them could have any size.
        table = parquet.ParquetFile(source, read_dictionary=[text.field])
        require_column(text.field, table.schema_arrow.names, path)
        left = allowed_bytes(spec, size)
        for batch in table.iter_batches(batch_size=1024, columns=[text.field]):
            for scalar in batch.column(0):
                value = scalar.as_py()
                if value is not None and not isinstance(value, str):
                    raise DataError(f"{path}: {text.field!r} contains {value!r:.40}; expected strings")
                if value:
                    left -= len(value)
                    if left < 0:
                        raise too_much(spec, path, size)
                    yield value
