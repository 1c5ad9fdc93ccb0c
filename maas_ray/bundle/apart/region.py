"""Tensors in memory that two processes share: numbers as they lie, strings with their lengths in front. Knows no run."""

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
"""Most bytes of the tensors of one side of a run."""
KEPT_BYTES = 16 << 20
"""What a region keeps between two runs; the system gets back what lies above it."""
_STRINGS = "s"
_KINDS = "?bBhHiIlLqQefd"
"""Type characters of numpy that may be in a region."""

Place = tuple[str, str, Sequence[int], int, int]
"""Name, type, shape, offset and number of bytes."""


class Region:
    """One side's tensors; the other process maps the same file.

    Args:
        descriptor: of a memory file, which this object owns from now on.
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
        """Puts tensors into the region; what was in it before is gone.

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
        """The tensors at some places.

        Args:
            places: as `write` returned them in the other process.
            is_copied: whether they are to outlive the next `write` of the other side.

        Raises:
            EngineFailed: the places are not inside the region.
        """
        size = os.fstat(self._descriptor).st_size
        arrays: dict[str, Array] = {}
        for name, kind, shape, start, num_bytes in places:
            if start < 0 or num_bytes < 0 or start + num_bytes > size:
                raise EngineFailed("the engine's process answered with tensors that are not there")
            memory = self._at_least(start + num_bytes)
            if kind == _STRINGS:
                arrays[name] = _split(memory[start : start + num_bytes], shape)
                continue
            if len(kind) != 1 or kind not in _KINDS or prod(shape) * np.dtype(kind).itemsize != num_bytes:
                raise EngineFailed("the engine's process answered with tensors that are none")
            view = np.ndarray(tuple(shape), np.dtype(kind), memory, start) if num_bytes else np.zeros(shape, kind)
            arrays[name] = view.copy() if is_copied else view
        return arrays

    def shrink(self) -> None:
        """Gives the system back what a large run took; the size stays, so that neither side looks past its end."""
        if self._map is not None and self._size > KEPT_BYTES:
            self._map.madvise(mmap.MADV_REMOVE, KEPT_BYTES, self._size - KEPT_BYTES)

    def close(self) -> None:
        """Gives the memory back."""
        self._map = None  # unmapped once the last view of it has gone
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _at_least(self, num_bytes: int) -> mmap.mmap:
        if self._map is None or num_bytes > self._size:
            if num_bytes > MAX_BYTES:
                raise EngineFailed(f"the tensors of a run have {num_bytes} bytes; at most {MAX_BYTES} are passed on")
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
