"""Tensors in memory shared by two processes: numbers as raw bytes, strings with length prefixes."""

import mmap
import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.strings import decode, encode
from maas_ray.errors import EngineFailed

ALIGNMENT = 64
START_BYTES = 1 << 16
MAX_BYTES = 4 << 30
"""Maximum bytes of the tensors of one side of a run."""
KEPT_BYTES = 16 << 20
"""Bytes that a region keeps between two runs; memory beyond it is returned to the system."""
_STRINGS = "s"
_KINDS = "?bBhHiIlLqQefd"
"""NumPy type characters that are allowed in a region."""

Place = tuple[str, str, Sequence[int], int, int]
"""Name, type, shape, offset and number of bytes."""


class Region:
    """One side's tensors; the other process maps the same file.

    Args:
        descriptor: descriptor of a memory file, which this object owns from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._size = 0

    @classmethod
    def create(cls) -> "Region":
        """A new region, to be shared by its descriptor."""
        return cls(os.memfd_create("tensors"))

    def fileno(self) -> int:
        return self._descriptor

    def write(self, arrays: Mapping[str, Array]) -> list[Place]:
        """Writes tensors into the region; overwrites its previous content.

        Raises:
            EngineFailed: they are too large.
        """
        places: list[Place] = []
        texts: dict[str, bytes] = {}
        offset = 0
        for name, array in arrays.items():
            if array.dtype == object:
                texts[name] = _join(array)
                kind, num_bytes = _STRINGS, len(texts[name])
            else:
                kind, num_bytes = array.dtype.char, array.nbytes
            places.append((name, kind, array.shape, offset, num_bytes))
            offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        memory = self._at_least(offset)
        for (name, _, shape, start, num_bytes), array in zip(places, arrays.values(), strict=True):
            if name in texts:
                memory[start : start + num_bytes] = texts[name]
            elif num_bytes:
                np.ndarray(shape, array.dtype, memory, start)[...] = array
        return places

    def read(self, places: Sequence[Place], *, is_copied: bool) -> dict[str, Array]:
        """Reads the tensors at the given places.

        Args:
            places: as `write` returned them in the other process.
            is_copied: whether to copy them, so that they outlive the next `write` of the other side.

        Raises:
            EngineFailed: the places are not inside the region.
        """
        size = os.fstat(self._descriptor).st_size
        arrays: dict[str, Array] = {}
        for name, kind, shape, start, num_bytes in places:
            if start < 0 or num_bytes < 0 or start + num_bytes > size:
                raise EngineFailed("the engine's process returned tensors outside its memory region")
            memory = self._at_least(start + num_bytes)
            if kind == _STRINGS:
                arrays[name] = _split(memory[start : start + num_bytes], shape)
                continue
            if len(kind) != 1 or kind not in _KINDS or prod(shape) * np.dtype(kind).itemsize != num_bytes:
                raise EngineFailed("the engine's process returned invalid tensors")
            view = np.ndarray(tuple(shape), np.dtype(kind), memory, start) if num_bytes else np.zeros(shape, kind)
            arrays[name] = view.copy() if is_copied else view
        return arrays

    def shrink(self) -> None:
        """Returns the memory of a large run to the system; keeps the size, so that neither side reads past the end."""
        if self._map is not None and self._size > KEPT_BYTES:
            self._map.madvise(mmap.MADV_REMOVE, KEPT_BYTES, self._size - KEPT_BYTES)

    def close(self) -> None:
        """Releases the memory."""
        self._map = None  # unmapped once its last view is released
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _at_least(self, num_bytes: int) -> mmap.mmap:
        if self._map is None or num_bytes > self._size:
            if num_bytes > MAX_BYTES:
                raise EngineFailed(f"the tensors of a run have {num_bytes} bytes; the limit is {MAX_BYTES} bytes")
            size = max(START_BYTES, 1 << (num_bytes - 1).bit_length())
            if os.fstat(self._descriptor).st_size < size:
                os.ftruncate(self._descriptor, size)
            self._map, self._size = mmap.mmap(self._descriptor, size), size
        return self._map


def _join(array: Array) -> bytes:
    texts = [encode(element) for element in array.ravel().tolist()]
    lengths = np.fromiter(map(len, texts), np.uint32, len(texts))
    return lengths.tobytes() + b"".join(texts)


def _split(data: bytes, shape: Sequence[int]) -> Array:
    count = prod(shape)
    array = np.empty(count, dtype=object)
    lengths: Any = np.frombuffer(data, np.uint32, count)
    stop = 4 * count
    for number, length in enumerate(lengths.tolist()):
        start, stop = stop, stop + length
        array[number] = decode(data[start:stop])
    return array.reshape(tuple(shape))
