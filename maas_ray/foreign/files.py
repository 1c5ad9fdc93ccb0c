"""Opens untrusted files: regular files of limited size, checked by their descriptor after opening once.

Independent of formats. Callers convert `Unreadable` to their own error, prefixed with the file's name.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Opens a named pipe or a device without blocking, so that it can be rejected."""
_CHUNK_BYTES = 1 << 20


class Unreadable(Exception):
    """A file that cannot be read; the message continues a sentence that begins with its name."""


@dataclass(frozen=True)
class Opened:
    """An open regular file.

    Attributes:
        size: size in bytes when it was opened.
    """

    descriptor: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes in [`start`, `stop`); fewer at the end of the file."""
        parts = []
        while start < stop and (part := os.pread(self.descriptor, min(stop - start, 1 << 30), start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in small pieces."""
        for start in range(0, self.size, _CHUNK_BYTES):
            yield self.read(start, min(start + _CHUNK_BYTES, self.size))


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """The descriptor of a directory, for `open_beside`: later renames of the path do not matter.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_file(path: str | Path, max_bytes: int, *, folder: int | None = None) -> Iterator[Opened]:
    """Opens a file given by the user; follows links.

    Args:
        path: path of the file.
        max_bytes: maximum size.
        folder: descriptor of the directory for a relative path; None: the working directory.

    Raises:
        FileNotFoundError: the file does not exist.
        Unreadable: it is not a regular file, is too large, or the system denies access.
    """
    with _open(path, _FLAGS, folder) as (descriptor, status):
        yield Opened(descriptor, _size(status, max_bytes))


@contextmanager
def open_beside(folder: int, name: str, max_bytes: int) -> Iterator[Opened]:
    """Opens a file that another file names; it must be in the same folder and have no other name.

    A symbolic or hard link would allow the author of the folder to name a file that only the reader can access.

    Args:
        folder: descriptor of the directory.
        name: a plain file name.
        max_bytes: maximum size.

    Raises:
        FileNotFoundError: the file does not exist.
        Unreadable: it is not a regular file in this folder alone, or is too large.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise Unreadable("is not a plain file name")
    with _open(name, _FLAGS | os.O_NOFOLLOW, folder) as (descriptor, status):
        if status.st_nlink != 1:
            raise Unreadable(f"has {status.st_nlink} names (hard links); replace it by a separate copy")
        yield Opened(descriptor, _size(status, max_bytes))


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """Reads a file given by the user; see `open_file`."""
    with open_file(path, max_bytes) as opened:
        return opened.read(0, opened.size)


@contextmanager
def _open(path: str | Path, flags: int, folder: int | None) -> Iterator[tuple[int, os.stat_result]]:
    try:
        descriptor = os.open(path, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = "it is a symbolic link" if flags & os.O_NOFOLLOW and _is_link(path, folder) else _reason(error)
        raise Unreadable(f"cannot be opened: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("is not a regular file")
        yield descriptor, status
    finally:
        os.close(descriptor)


def _size(status: os.stat_result, max_bytes: int) -> int:
    if status.st_size > max_bytes:
        raise Unreadable(f"has {status.st_size} bytes; the limit is {max_bytes} bytes")
    return status.st_size


def _is_link(path: str | Path, folder: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
    except (OSError, ValueError):
        return False


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "its name contains a zero byte"
