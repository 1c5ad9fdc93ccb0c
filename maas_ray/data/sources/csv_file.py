"""Reads csv files as text, with the options of `ReaderOptions`. Independent of columns' kinds.

pyarrow parses; what it has no option for (comments, spaces after delimiters, zip archives) is changed in the bytes before.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import csv

from maas_ray.data.sources.bounds import MAX_COLUMNS, too_many_columns
from maas_ray.data.sources.files import check_expansion, open_stream
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.errors import DataError

MAX_CSV_ROW_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 20
_UTF8 = ("utf-8", "utf8", "utf_8", "UTF-8")

Options = tuple[csv.ReadOptions, csv.ParseOptions, csv.ConvertOptions]


def read_csv(spec: DataSpec, files: Any, path: str) -> pa.Table:
    """Reads a file into memory; every column is text.

    Raises:
        DataError: the file cannot be read with the spec's options.
    """
    with open_csv(spec, files, path) as reader:
        return reader.read_all()


@contextmanager
def open_csv(spec: DataSpec, files: Any, path: str) -> Iterator[csv.CSVStreamingReader]:
    """Opens a file as a reader of record batches of text.

    Raises:
        DataError: the file cannot be read with the spec's options; also while it is read.
    """
    reader = reader_of(spec.reader, path)
    watch = _Watch(reader)
    try:
        check_expansion(spec, files, path)
        _, options = csv_options(spec, files, path)
        with _opened(spec, reader, files, path, watch) as stream, csv.open_csv(stream, *options) as opened:
            yield opened
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        watch.refuse(path)
        raise csv_error(path, str(error), reader) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    watch.refuse(path)


def read_header(spec: DataSpec, files: Any, path: str) -> list[str]:
    """The columns of a file.

    Raises:
        DataError: the header cannot be read.
    """
    try:
        return csv_options(spec, files, path)[0]
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise csv_error(path, str(error), reader_of(spec.reader, path)) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def reader_of(reader: ReaderOptions, path: str) -> ReaderOptions:
    """The options for one file: the values of `.tsv` files are separated by tabs."""
    name = path.rsplit("/", 1)[-1].lower()
    return reader.model_copy(update={"delimiter": "\t"}) if ".tsv" in name else reader


def csv_options(spec: DataSpec, files: Any, path: str) -> tuple[list[str], Options]:
    """The columns of a csv file, and the options that read every column as text.

    Raises:
        DataError: the file is not in its encoding, or its options do not fit.
        pa.ArrowInvalid, UnicodeDecodeError, OSError: the header cannot be read; see `csv_error`.
    """
    reader = reader_of(spec.reader, path)
    parse = csv.ParseOptions(
        delimiter=reader.delimiter, newlines_in_values=True, escape_char=reader.escape or False, quote_char='"'
    )
    own = list(reader.column_names or ())
    options = csv.ReadOptions(block_size=MAX_CSV_ROW_BYTES, encoding=_encoding(reader), column_names=own or None)
    with open_stream(spec, files, path) as stream:
        _refuse_wide_header(stream, reader, path)
    with _opened(spec, reader, files, path, _Watch(reader)) as stream, csv.open_csv(stream, options, parse) as head:
        names = head.schema.names
    if any("\0" in name for name in names):  # UTF-16 read as UTF-8
        raise csv_error(path, "UTF8: the header contains zero bytes", reader)
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=list(reader.missing_values),
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    return names, (options, parse, convert)


def csv_error(path: str, text: str, reader: ReaderOptions) -> DataError:
    """Translates pyarrow's message about a csv file."""
    if "Empty CSV" in text:
        return DataError(f"{path} is empty")
    if "UTF8" in text or "utf-8" in text or "\0" in text or "codec can't decode" in text:
        return DataError(
            f"{path} is not text in {'UTF-8' if reader.encoding in _UTF8 else reader.encoding} ({text}); set "
            "data.encoding, for instance latin-1, cp1252 or utf-16, or convert it with iconv -t UTF-8"
        )
    if reader.column_names is not None and "columns, got" in text:
        return DataError(
            f"cannot read {path} as a csv file: {text}; data.column_names has {len(reader.column_names)} names"
        )
    return DataError(f"cannot read {path} as a csv file: {text}")


def _encoding(reader: ReaderOptions) -> str:
    """Pyarrow's option: UTF-8 for bytes that `_opened` has already decoded."""
    return "utf8" if reader.encoding in _UTF8 or _is_filtered(reader) else reader.encoding


def _is_filtered(reader: ReaderOptions) -> bool:
    return reader.comment is not None or reader.skip_initial_space


@contextmanager
def _opened(spec: DataSpec, reader: ReaderOptions, files: Any, path: str, watch: "_Watch") -> Iterator[Any]:
    """A stream for pyarrow of the decompressed file."""
    with open_stream(spec, files, path) as raw:
        watch.stream = _Filtered(raw, reader) if _is_filtered(reader) else raw
        yield pa.PythonFile(watch, mode="r")


class _Watch(io.RawIOBase):
    """A stream that notices quotes after a backslash, which only a reader with `escape` reads correctly.

    A quote inside a quoted value is doubled, and a quote that ends it is followed by a delimiter or the end of the line;
    any other character after it would be appended to the value, with the remaining quotes.
    """

    stream: Any = None

    def __init__(self, reader: ReaderOptions) -> None:
        ends = re.escape(reader.delimiter).encode()
        self._sign = re.compile(rb'\\"[^"\r\n' + ends + rb"]") if reader.escape is None else None
        self._last = b""
        self.found = False

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, or all remaining bytes if `size` is negative."""
        data: bytes = self.stream.read(size) if size >= 0 else self.stream.read()
        if self._sign is not None and not self.found and (b'\\"' in data or self._last):
            self.found = self._sign.search(self._last + data) is not None
        self._last = data[-2:] if data[-1:] in (b"\\", b'"') else b""
        return data

    def refuse(self, path: str) -> None:
        """Raises `DataError` if a quote after a backslash was read."""
        if self.found:
            raise DataError(
                f'{path} contains quotes inside values that are written \\" instead of ""; set data.escape: \'\\\''
            )


class _Filtered(io.RawIOBase):
    """Bytes of a csv file in UTF-8 without its comments and without spaces after delimiters.

    Args:
        raw: the decompressed file.
        reader: its options.
    """

    def __init__(self, raw: Any, reader: ReaderOptions) -> None:
        self._lines = _decoded_lines(raw, reader.encoding)
        self._comment = reader.comment
        self._delimiter = reader.delimiter if reader.skip_initial_space else None
        self._is_quoted = False
        self._ready = b""

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, or all remaining bytes if `size` is negative."""
        parts, num_bytes = [self._ready], len(self._ready)
        while size < 0 or num_bytes < size:
            line = next(self._lines, None)
            if line is None:
                break
            parts.append(self._filter(line).encode())
            num_bytes += len(parts[-1])
        joined = b"".join(parts)
        end = len(joined) if size < 0 else size
        self._ready = joined[end:]
        return joined[:end]

    def _filter(self, line: str) -> str:
        """The line, or nothing for a comment; a line inside quotes belongs to a value and is not changed."""
        was_quoted = self._is_quoted
        if not was_quoted and self._comment is not None and line.startswith(self._comment):
            return ""
        if self._delimiter is not None:
            line = self._without_spaces(line)
        if line.count('"') % 2:
            self._is_quoted = not was_quoted
        return line

    def _without_spaces(self, line: str) -> str:
        if '"' not in line:
            return line if self._is_quoted else re.sub(f"(^|{re.escape(self._delimiter or '')}) +", r"\1", line)
        parts = line.split('"')  # every second part is inside quotes
        first = int(self._is_quoted)
        for place in range(first, len(parts), 2):
            parts[place] = re.sub(
                f"({'^|' if not place else ''}{re.escape(self._delimiter or '')}) +", r"\1", parts[place]
            )
        return '"'.join(parts)


def _decoded_lines(raw: Any, encoding: str) -> Iterator[str]:
    name = "utf-8-sig" if encoding in _UTF8 else encoding
    yield from io.TextIOWrapper(io.BufferedReader(_Raw(raw), _BLOCK_BYTES), encoding=name, newline="")


class _Raw(io.RawIOBase):
    """The interface of Python's buffers over a stream that only has `read`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _refuse_wide_header(stream: Any, reader: ReaderOptions, path: str) -> None:
    """Raises `DataError` before the parser creates a column for each of a million names."""
    delimiter, end_of_line = reader.delimiter.encode(reader.encoding)[-1:], b"\n"
    num_read = num_found = 0
    while num_read < MAX_CSV_ROW_BYTES and (block := stream.read(1 << 16)):
        line, end, _ = block.partition(end_of_line)
        num_read, num_found = num_read + len(block), num_found + line.count(delimiter)
        if num_found > MAX_COLUMNS:
            raise too_many_columns(path, f"more than {MAX_COLUMNS}")
        if end:
            return
