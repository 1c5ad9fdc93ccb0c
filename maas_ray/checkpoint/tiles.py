"""Cuts tensors into tiles: rectangles that a reader with another layout fetches separately. Plain arithmetic."""

import itertools
import math
from collections.abc import Iterator, Sequence

MIN_TILE_BYTES = 64 << 10
TILE_BYTES = 1 << 20
MAX_TILES = 1 << 16
"""Approximate maximum number of tiles of a checkpoint; limits the manifest of a very large model to a few megabytes."""

_MIN_RUN_BYTES = 256  # a tile's rows are copied one by one: shorter rows would cost more than they save

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a rectangle inside a tensor."""


def grid(shape: Sequence[int], itemsize: int, total_bytes: int = 0) -> list[list[int]]:
    """The positions at which each dimension of a tensor is cut, ascending from 0 to its size.

    The cuts belong to the whole tensor, not to a layout, so that the tiles of all layouts fit into each other. Rows
    and columns are halved in turn, the way `torch.chunk` cuts for 2, 4, 8 … ranks (multiples of ceil(n / ranks)),
    which makes loading under such a layout exact even for sizes that do not divide. A tensor gets 16 tiles
    of at least `MIN_TILE_BYTES`, larger ones up to 64 of at least `TILE_BYTES`.

    Args:
        shape: shape of the whole tensor.
        itemsize: bytes of an element.
        total_bytes: bytes of the whole checkpoint; tiles grow with it.
    """
    nbytes = math.prod(shape) * itemsize
    wanted = max(nbytes // 16, MIN_TILE_BYTES) if nbytes <= 16 * TILE_BYTES else max(nbytes // 64, TILE_BYTES)
    wanted = max(wanted, total_bytes // MAX_TILES)
    levels = [0] * len(shape)
    extents = list(shape)
    while math.prod(extents) * itemsize > wanted:
        can = [dim for dim in range(min(len(shape), 2)) if _can_halve(dim, extents, itemsize)]
        if not can:
            break
        dim = min(can, key=lambda dim: levels[dim])
        levels[dim] += 1
        extents[dim] = -(-shape[dim] // 2 ** levels[dim])
    edges = [_edges(size, level) for size, level in zip(shape, levels, strict=True)]
    if edges:  # FSDP cuts rows that tensor parallelism has cut: at other rows if sizes do not divide evenly
        edges[0] = sorted({*edges[0], *_halves(0, shape[0], levels[0])})
    return edges


def cut(box: Box, edges: Sequence[Sequence[int]]) -> Iterator[Box]:
    """The tiles of one rank's part of a tensor, row by row: its box cut along `edges`."""
    intervals = []
    for offset, size, positions in zip(*box, edges, strict=True):
        inner = [position for position in positions if offset < position < offset + size]
        intervals.append(list(itertools.pairwise([offset, *inner, offset + size])))
    for corner in itertools.product(*intervals):
        yield tuple(start for start, _ in corner), tuple(stop - start for start, stop in corner)


def _can_halve(dim: int, extents: Sequence[int], itemsize: int) -> bool:
    if extents[dim] < 2:
        return False
    return dim == 0 or math.prod(extents[dim:]) // 2 * itemsize >= _MIN_RUN_BYTES


def _halves(start: int, size: int, level: int) -> Iterator[int]:
    """The cuts of a dimension whose pieces are halved repeatedly."""
    if level and size > 1:
        half = -(-size // 2)
        yield start + half
        yield from _halves(start, half, level - 1)
        yield from _halves(start + half, size - half, level - 1)


def _edges(size: int, level: int) -> list[int]:
    steps = [-(-size // 2**each) for each in range(level + 1)]
    return sorted({0, size, *(position for step in steps if step for position in range(0, size, step))})
