"""Finds and opens the files that a data URI names, locally or on S3, with pyarrow. Independent of file contents."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pyarrow import fs

from maas_ray.data.sources.bounds import BoundedStream
from maas_ray.data.sources.partitions import SIGNS, is_partition
from maas_ray.data.spec.data import DataSpec, Format
from maas_ray.errors import DataError

EXTENSIONS: dict[str, Format] = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".csv.bz2": "csv",
    ".csv.zst": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
    ".zip": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npz": "numpy",
    ".npy": "numpy",
    ".txt": "text",
    ".txt.gz": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".png": "images",
    ".jpg": "images",
    ".jpeg": "images",
    ".bmp": "images",
    ".webp": "images",
    ".tif": "images",
    ".tiff": "images",
    ".gif": "images",
    "-ubyte": "idx",
    "-ubyte.gz": "idx",
}
ZIP = ".zip"
_CODECS = (".gz", ".bz2", ".lz4", ".zst", ZIP)
"""Extensions of compressed files: archives of one file, and those that pyarrow decompresses."""
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = {"connect_timeout": 5, "request_timeout": 60}


def filesystem(spec: DataSpec, uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a URI and the path on it.

    Raises:
        DataError: the scheme is unknown.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return fs.LocalFileSystem(), str(Path(rest if separator else uri).expanduser().absolute())
    if scheme != "s3":
        raise DataError(f"{uri}: unknown scheme {scheme!r}; use a path, file://, s3:// or sklearn:")
    options: dict[str, Any] = dict(_TIMEOUT_S)
    if spec.endpoint:
        protocol, _, host = spec.endpoint.rpartition("://")
        options.update(endpoint_override=host, scheme=protocol or "https")
    if spec.region:
        options["region"] = spec.region
    return fs.S3FileSystem(**options), rest


@dataclass(frozen=True)
class File:
    """One file."""

    path: str
    """On the URI's filesystem."""
    size: int
    """Bytes."""
    modified_ns: int = 0
    """Time of the last modification, in nanoseconds since 1970."""


def list_files(spec: DataSpec) -> list[File]:
    """All files that the URI names, sorted by path.

    Raises:
        DataError: the URI names no file, or cannot be accessed.
    """
    files, path = filesystem(spec, spec.uri)
    try:
        if any(sign in path for sign in SIGNS):
            found = _match(files, path)
        else:
            info = files.get_file_info(path)
            if info.type == fs.FileType.File:
                found = [info]
            elif info.type == fs.FileType.Directory:
                found = _in_folder(files, path)
            else:
                raise DataError(f"{spec.uri} does not exist; check data.uri (relative paths start at {Path.cwd()})")
    except OSError as error:
        raise DataError(f"cannot list {spec.uri}: {_first_line(error)}") from error
    if not found:
        raise DataError(
            f"{spec.uri} names no file; set data.uri to a file, a directory with files, or a glob that matches files"
        )
    return sorted(
        (File(entry.path, entry.size or 0, entry.mtime_ns or 0) for entry in found), key=lambda file: file.path
    )


def open_stream(spec: DataSpec, files: Any, path: str) -> Any:
    """A stream of one file, decompressed if its name ends in .gz, .zip or another codec's extension.

    Raises:
        DataError: an archive does not contain exactly one file; or, while it is read: it expands to more than
            `data.max_expansion` allows.
        OSError: it cannot be opened.
    """
    stream = _open_zip(files, path) if path.lower().endswith(ZIP) else files.open_input_stream(path)
    if not path.lower().endswith(_CODECS):
        return stream
    return BoundedStream(stream, spec, path, files.get_file_info(path).size or 0)


def _open_zip(files: Any, path: str) -> Any:
    """A stream of the only file in an archive; folders and the files that macOS adds do not count."""
    try:
        archive = zipfile.ZipFile(files.open_input_file(path))
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise DataError(f"{path} contains {len(names)} files; expected one; unpack it")
        return archive.open(names[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, or encrypted
        raise DataError(f"cannot read {path} as a zip archive: {error}") from error


def check_expansion(spec: DataSpec, files: Any, path: str) -> None:
    """Decompresses a file once to check its expanded size; does nothing for a file that is not compressed.

    For parsers that read ahead in their own threads, where a stream that raises an error is not safe.

    Raises:
        DataError: it expands to more than `data.max_expansion` allows.
        OSError: it cannot be read.
    """
    if path.lower().endswith(_CODECS):
        with open_stream(spec, files, path) as stream:
            while stream.read(_CHUNK_BYTES):
                continue


def read_bytes(spec: DataSpec, uri: str) -> bytes:
    """The bytes of one file, decompressed as by `open_stream`.

    Raises:
        DataError: it does not exist, is empty, cannot be read, or expands to too many bytes.
    """
    files, path = filesystem(spec, uri)
    try:
        with open_stream(spec, files, path) as stream:
            data: bytes = stream.read()
    except FileNotFoundError as error:
        raise DataError(f"{uri} does not exist") from error
    except OSError as error:
        raise DataError(f"cannot read {uri}: {_first_line(error)}") from error
    if not data:
        raise DataError(f"{uri} is empty")
    return data


def format_of(spec: DataSpec, paths: list[str]) -> Format:
    """The format in the spec, or the one format of all files' extensions.

    Raises:
        DataError: an extension is unknown, or the files have several formats.
    """
    if spec.format != "auto":
        return spec.format
    formats: dict[Format, str] = {}
    for path in paths:
        extension = extension_of(path)
        if extension is None:
            raise DataError(f"{path}: unknown extension; expected one of {', '.join(EXTENSIONS)}, or set data.format")
        formats.setdefault(EXTENSIONS[extension], path)
    if len(formats) > 1:
        raise DataError(
            f"{spec.uri} contains files of several formats ({', '.join(formats.values())}); select one format with a "
            "glob"
        )
    return next(iter(formats))


def extension_of(path: str) -> str | None:
    """The longest known extension with which a path ends, in any case; None: unknown."""
    return next((end for end in sorted(EXTENSIONS, key=len, reverse=True) if path.lower().endswith(end)), None)


def _match(files: Any, pattern: str) -> list[Any]:
    """The data files that a glob matches; a star stays within one folder, two stars match any number of folders."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in SIGNS))
    selector = fs.FileSelector("/".join(parts[:first]) or "/", recursive=first < len(parts) - 1 or "**" in parts)
    found = files.get_file_info(selector)
    return [entry for entry in found if _is_data(entry) and _matches(entry.path.split("/"), parts)]


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[skipped:], pattern[1:] or ("*",)) for skipped in range(len(path)))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _in_folder(files: Any, path: str) -> list[Any]:
    """The data files in a folder; without any, those in folders that name a value of a column, or a class."""
    entries = files.get_file_info(fs.FileSelector(path))
    if found := [entry for entry in entries if _is_data(entry)]:
        return found
    if any(entry.type == fs.FileType.Directory and is_partition(entry.base_name) for entry in entries):
        below = files.get_file_info(fs.FileSelector(path, recursive=True))
        depth = path.rstrip("/").count("/") + 1
        return [entry for entry in below if _is_data(entry) and all(map(is_partition, entry.path.split("/")[depth:-1]))]
    return _match(files, f"{path.rstrip('/')}/*/*")


def count_unread(spec: DataSpec, read: Sequence[File]) -> dict[str, str]:
    """The files below a folder that are not read because they are in folders of it, with the reason; for the profile."""
    files, path = filesystem(spec, spec.uri)
    if any(sign in path for sign in SIGNS):
        return {}
    try:
        if files.get_file_info(path).type != fs.FileType.Directory:
            return {}
        below = [one for one in files.get_file_info(fs.FileSelector(path, recursive=True)) if _is_data(one)]
    except OSError as error:
        raise DataError(f"cannot list {spec.uri}: {_first_line(error)}") from error
    known = {file.path for file in read}
    unread = sorted(
        {one.path.rpartition("/")[0] for one in below if one.path not in known and not _is_hidden(one, path)}
    )
    number = sum(one.path not in known and not _is_hidden(one, path) for one in below)
    return {unread[0]: f"{number} files in {len(unread)} inner folders"} if unread else {}


def _is_hidden(entry: Any, path: str) -> bool:
    return any(part.startswith((".", "_")) for part in entry.path.removeprefix(path).split("/"))


def _is_data(entry: Any) -> bool:
    """False for files whose name starts with a dot or underscore; by convention they are not data (`_SUCCESS`)."""
    return entry.type == fs.FileType.File and not entry.base_name.startswith((".", "_"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
