"""What a disk may hold after a power cut: only what was synced is sure; every directory and file is old or new.

The model is POSIX's, as filesystems use their freedom at worst: a file that was never synced is there with no bytes,
half of them or all; a directory has the names of its last `fsync`, or those of now, whatever its neighbours have.
"""

import os
import random
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest


class PowerCut:
    """Follows every `os.fsync` below a directory, and makes copies of it as they may be found after a power cut.

    Args:
        root: exists, and is on the disk.
        on_sync: called before each `fsync` takes place: a moment at which the power may go.
    """

    def __init__(self, root: Path, on_sync: Callable[[], None] | None = None) -> None:
        self.num_syncs = 0
        self._root = root
        self._on_sync = on_sync
        self._files: dict[int, bytes] = {}
        self._directories: dict[int, dict[str, tuple[int, bool]]] = {}
        self._lock = threading.RLock()

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """From here on syncs count; what was there before is on the disk."""
        for path in [self._root, *self._root.rglob("*")]:
            self._remember(path, path.stat().st_ino, path.is_dir())
        real = os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}")
            with self._lock:
                if Path(os.readlink(path)).is_relative_to(self._root):
                    if self._on_sync is not None:
                        self._on_sync()
                    found = os.fstat(descriptor)
                    self._remember(path, found.st_ino, stat.S_ISDIR(found.st_mode))
                    self.num_syncs += 1
            real(descriptor)

        patch.setattr(os, "fsync", fsync)

    def copy(self, target: Path, draw: random.Random | None) -> None:
        """Writes what is found after the cut; `draw` decides what is old and what is new, None: all is old."""
        with self._lock:
            self._copy_directory(self._root, self._root.stat().st_ino, target, draw)

    def _remember(self, path: Path, inode: int, is_directory: bool) -> None:
        if is_directory:
            self._directories[inode] = _entries(path)
        else:
            self._files[inode] = path.read_bytes()

    def _copy_directory(self, path: Path, inode: int, target: Path, draw: random.Random | None) -> None:
        target.mkdir()
        entries = self._directories.get(inode, {})
        if draw is not None and draw.random() < 0.5 and _is(path, inode):
            entries = _entries(path)
        for name, (child, is_directory) in entries.items():
            if is_directory:
                self._copy_directory(path / name, child, target / name, draw)
            else:
                (target / name).write_bytes(self._bytes(path / name, child, draw))

    def _bytes(self, path: Path, inode: int, draw: random.Random | None) -> bytes:
        synced = self._files.get(inode, b"")
        if draw is None or not _is(path, inode):
            return synced
        now = path.read_bytes()
        return draw.choice([synced, now, now if inode in self._files else now[: len(now) // 2]])


def _entries(path: Path) -> dict[str, tuple[int, bool]]:
    with os.scandir(path) as found:
        return {each.name: (each.inode(), each.is_dir()) for each in found}


def _is(path: Path, inode: int) -> bool:
    """Whether this is still the same file."""
    try:
        return path.stat().st_ino == inode
    except OSError:
        return False
