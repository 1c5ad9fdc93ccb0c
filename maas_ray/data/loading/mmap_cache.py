"""Memory-maps the parts of committed objects: verified, and shared by all processes of a machine.

The parts of a store in a local directory are mapped in place. From any other store a part is downloaded once per
machine to `$MAAS_RAY_HOME/parts` (or `~/.maas-ray/parts`), whose oldest files are deleted when it exceeds its limit.
"""

import mmap
import os
import uuid
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray

from maas_ray.errors import DataError, ObjectCorrupt
from maas_ray.process.home import state_directory
from maas_ray.store.manifest import Committed, Part

MAX_CACHE_BYTES = 1 << 36
_LOCK_TIMEOUT_S = 600.0


def map_part(committed: Committed, name: str, datatype: DTypeLike) -> NDArray[Any]:
    """Maps one part read-only; every byte is verified first.

    Args:
        committed: the committed object with the part.
        name: name of the part.
        datatype: datatype of the values, whose bytes are the part.

    Raises:
        ObjectCorrupt: the part is missing, truncated or altered.
        DataError: the disk is full, or another process locks the folder for too long.
    """
    mapped = map_bytes(committed, name)
    try:
        return np.frombuffer(mapped, dtype=datatype)
    except ValueError as error:  # not a whole number of values
        raise ObjectCorrupt(f"the committed object {committed.parts[name].key} cannot be mapped: {error}") from error


def map_bytes(committed: Committed, name: str) -> mmap.mmap:
    """As `map_part`, for a part in a format of its own."""
    part = committed.parts[name]
    path = local_path(committed, name) or _fetch(committed, name)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # no file, or no bytes
        raise ObjectCorrupt(f"the committed object {part.key} cannot be mapped from {path}: {error}") from error
    if not _is_right(mapped, part):
        raise ObjectCorrupt(
            f"the committed object {part.key}, read from {path}, does not match the digest in its manifest; restore it "
            "from a backup"
        )
    return mapped


def local_path(committed: Committed, name: str) -> Path | None:
    """The path of a part if its store is a directory of this machine, else None."""
    store = committed.store
    return store.root / committed.parts[name].key if store.root else None


def _is_right(content: mmap.mmap | bytes, part: Part) -> bool:
    return len(content) == part.size and sha256(content).hexdigest() == part.sha256


def _fetch(committed: Committed, name: str) -> Path:
    """The part's file on this machine. A file whose content is wrong is downloaded again."""
    part = committed.parts[name]
    folder = state_directory() / "parts"
    path = folder / part.sha256
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / ".lock", timeout=_LOCK_TIMEOUT_S):  # the ranks of a machine wait for one download
            if path.exists() and _is_right(path.read_bytes(), part):
                os.utime(path)
                return path
            content = committed.read(name)
            partial = folder / f".{uuid.uuid4().hex}"
            try:
                partial.write_bytes(content)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            _trim(folder, keep=path)
    except Timeout as error:
        raise DataError(
            f"another process has locked {folder} for more than {_LOCK_TIMEOUT_S:.0f} s; wait for its download or stop "
            "it"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot store {part.size} bytes in {folder}: {error}; set MAAS_RAY_HOME to a folder with enough free space"
        ) from error
    return path


def _trim(folder: Path, keep: Path) -> None:
    """Removes the least recently used files; a process that has mapped one keeps its bytes."""
    files = [path for path in folder.iterdir() if path not in (keep, folder / ".lock")]
    # The process with the lock is the only writer: other files with a dot are leftovers of killed processes.
    files.sort(key=lambda path: (not path.name.startswith("."), path.stat().st_mtime))
    excess = keep.stat().st_size + sum(path.stat().st_size for path in files) - MAX_CACHE_BYTES
    for path in files:
        if excess > 0 or path.name.startswith("."):
            excess -= path.stat().st_size
            path.unlink()
