"""Writes and removes objects in a local directory such that they survive a power cut. Independent of commits.

A name is only as durable as its parent directories: POSIX guarantees a file's bytes after `fsync` of the file, its name
after `fsync` of its directory, and that directory's name after `fsync` of its parent. obstore's own writes do not sync,
and make a name visible before its bytes are durable: after a power cut a committed manifest could be an empty file.
"""

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

STAGED = re.compile(r"#\d+$")
"""Names of objects that are still being created; obstore's listings omit them."""

_NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

WRITE_BYTES = 8 << 20
DIRECT_BYTES = 1 << 20
"""Smaller objects are written through the page cache, because they are read again soon."""

BLOCK_BYTES = 4096
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_ATTEMPTS = 16  # attempts to open a file in a directory that other processes remove when it is empty


class Directory:
    """The files of a store.

    Args:
        root: the directory; created with its parents if it does not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        _make(root)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes an object; bytes and names are on the disk when it returns. A killed write leaves a partial object."""
        path = self._path(key)
        self._write(path, data)
        _sync(path.parent)

    def create(self, key: str, data: bytes) -> None:
        """Creates an object atomically: its name appears once its bytes and all parent names are on the disk.

        Raises:
            FileExistsError: it exists.
        """
        path = self._path(key)
        staged = path.with_name(f"{path.name}#{uuid.uuid4().int}")
        self._write(staged, data)
        try:
            # Also makes the names of other processes' files in these directories durable, such as a commit's parts.
            for above in path.parents:
                _sync(above)
                if above == self.root:
                    break
            os.link(staged, path)
        finally:
            staged.unlink(missing_ok=True)
        _sync(path.parent)

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects and the directories that become empty; durable when it returns."""
        paths = [self._path(key) for key in keys]
        for path in paths:
            path.unlink(missing_ok=True)
        for directory in {self._drop_empty(path.parent) for path in paths}:
            with contextlib.suppress(FileNotFoundError):  # another process removed it, and synced its parent
                _sync(directory)

    def scan(self, prefix: str, after: str | None) -> Iterator[tuple[str, int, float]]:
        """Key, size and modification time of all objects below a prefix, sorted; skips entries that are not objects.

        obstore's own listing ends at the first name that cannot be a key, and at a link to a parent directory: one
        foreign file would hide all others. Size and time are read when an entry is consumed.
        """
        found = [
            (key, entry)
            for key, entry in self._walk(prefix)
            if key is not None and (after is None or key > after) and not STAGED.search(key)
        ]
        for key, entry in sorted(found, key=lambda pair: pair[0]):
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                if _leads_to(entry.is_file):
                    stat = entry.stat()
                    yield key, stat.st_size, stat.st_mtime

    def children(self, prefix: str) -> list[str]:
        """Names of the directories directly below a prefix, sorted."""
        place = self.root / prefix
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as entries:
            return sorted(entry.name for entry in entries if _is_name(entry.name) and _leads_to(entry.is_dir))
        return []

    def odd(self) -> Iterator[str]:
        """Entries that cannot be objects and that no listing contains: invalid names, broken links, pipes and so on."""
        for key, entry in self._walk(""):
            is_directory = _leads_to(entry.is_dir)
            if key is None or not (is_directory or _leads_to(entry.is_file)):
                yield os.path.relpath(entry.path, self.root)
            elif is_directory and key.endswith(".json"):
                yield key

    def is_object(self, key: str) -> bool:
        """Whether the key is a regular file: reading a pipe would block."""
        return (self.root / key).is_file()

    def _walk(self, prefix: str) -> Iterator[tuple[str | None, os.DirEntry[str]]]:
        """All entries below a prefix with their keys; None: the name is not a valid key. Follows links, not cycles."""
        pending = [(prefix, frozenset[tuple[int, int]]())]
        while pending:
            place, above = pending.pop()
            try:
                stat = os.stat(self.root / place)
                with os.scandir(self.root / place) as entries:
                    listed = list(entries)
            except (FileNotFoundError, NotADirectoryError):
                continue
            identity = (stat.st_dev, stat.st_ino)
            if identity in above:
                continue
            for entry in listed:
                key = f"{place}/{entry.name}" if place else entry.name
                is_name = _is_name(entry.name)
                yield (key if is_name else None), entry
                if is_name and _leads_to(entry.is_dir):
                    pending.append((key, above | {identity}))

    def staged(self) -> Iterator[Path]:
        """Temporary files of interrupted calls of `create`."""
        return (path for path in self.root.rglob("*#*") if STAGED.search(path.name) and path.is_file())

    def _path(self, key: str) -> Path:
        segments = key.split("/")
        if any(segment in ("", ".", "..") or "\0" in segment for segment in segments) or STAGED.search(key):
            raise ValueError(
                f"invalid key {key!r}: a key is names separated by slashes, and does not end in # and digits"
            )
        return self.root / key

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        descriptor = self._open(path)
        try:
            view = memoryview(data).cast("B")
            view = view[_write_blocks(descriptor, view) :]
            while view:
                view = view[os.write(descriptor, view[:WRITE_BYTES]) :]
            os.fsync(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)  # a partial file would only take space
            raise
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, _FLAGS, 0o666)
            with contextlib.suppress(FileNotFoundError):
                _make(path.parent)
        return os.open(path, _FLAGS, 0o666)

    def _drop_empty(self, directory: Path) -> Path:
        """Removes empty directories from here upward; returns the first directory that is not empty."""
        while directory != self.root:
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                break  # not empty, or another writer has created a file in it
            directory = directory.parent
        return directory


def _leads_to(kind: Callable[[], bool]) -> bool:
    """`entry.is_file` or `entry.is_dir`; false for a link to itself."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _is_name(name: str) -> bool:
    """Whether a file's name can be part of a key: UTF-8 without control characters."""
    return not _NO_NAME.search(name)


def _write_blocks(descriptor: int, view: memoryview) -> int:
    """Writes whole blocks from memory to the disk without a copy in the page cache, which would not be read soon.

    It takes a fifth of the CPU time of other writes, which leaves the rest to training.

    Returns:
        The bytes written; 0 if the system or the filesystem does not support it, or the memory is not page-aligned.
    """
    direct = getattr(os, "O_DIRECT", 0)
    done, end = 0, len(view) // BLOCK_BYTES * BLOCK_BYTES
    if not direct or end < DIRECT_BYTES:
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct)
        while done < end:
            done += os.write(descriptor, view[done : min(done + WRITE_BYTES, end)])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _make(directory: Path) -> None:
    """Creates a directory and its parents; their names are on the disk when it returns."""
    if directory.is_dir():
        return
    _make(directory.parent)
    with contextlib.suppress(FileExistsError):  # created by another process in the meantime
        directory.mkdir()
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
