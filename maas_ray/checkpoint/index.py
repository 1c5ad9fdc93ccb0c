"""The index of a checkpoint: the location of every tile of every tensor, as JSON in the sealed manifest."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from maas_ray.checkpoint.dtypes import DTYPES, NAMES
from maas_ray.errors import ObjectCorrupt
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed

FORMAT = 3


@dataclass(frozen=True)
class Tile:
    """One stored tile: its rectangle, the part and offset of its bytes, and their `piece_digest` in hex."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    part: str
    start: int
    size: int
    digest: str


@dataclass(frozen=True)
class Stored:
    """One stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def metadata(index: Mapping[str, Stored]) -> Metadata:
    """The metadata for torch's load planner; chunk i is tile i."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(tile.offsets), torch.Size(tile.sizes)) for tile in tensor.tiles],
            )
            for name, tensor in index.items()
        }
    )


def write_index(index: Mapping[str, Stored], parts: Sequence[str]) -> dict[str, Any]:
    """The index as plain JSON; parts are identified by their index in `parts`."""
    numbers = {name: number for number, name in enumerate(parts)}
    return {
        "parts": list(parts),
        "tensors": {
            name: {
                "dtype": NAMES[tensor.dtype],
                "shape": tensor.shape,
                "tiles": [
                    [tile.offsets, tile.sizes, numbers[tile.part], tile.start, tile.digest] for tile in tensor.tiles
                ],
            }
            for name, tensor in index.items()
        },
    }


def read_index(committed: Committed) -> dict[str, Stored]:
    """The tensors of a checkpoint.

    Raises:
        ObjectCorrupt: the format is unknown, or the index does not describe whole tensors inside its parts.
    """
    meta = committed.meta
    if meta.get("format") != FORMAT:
        raise ObjectCorrupt(
            f"{committed.prefix} has format {str(meta.get('format'))[:20]}; this version reads {FORMAT}; not used"
        )
    try:
        names = meta["index"]["parts"]
        index = {name: _tensor(raw, names) for name, raw in meta["index"]["tensors"].items()}
        for name, tensor in index.items():
            _check(committed, name, tensor)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ObjectCorrupt(f"cannot read the index of {committed.prefix} ({str(error)[:200]}); not used") from error
    return index


def tensors_digest(index: Mapping[str, Stored]) -> str:
    """Hex sha256 of names, shapes, types and values, independent of parts: equal for equal tensors in equal tiles."""
    tiles: Iterable[list[Any]] = (
        [
            name,
            NAMES[tensor.dtype],
            tensor.shape,
            sorted((tile.offsets, tile.sizes, tile.digest) for tile in tensor.tiles),
        ]
        for name, tensor in sorted(index.items())
    )
    return sha256(canonical_json(list(tiles))).hexdigest()


def _tensor(raw: Mapping[str, Any], parts: Sequence[str]) -> Stored:
    dtype = DTYPES[raw["dtype"]]
    tiles = []
    _check_counts(raw["shape"])
    for offsets, sizes, part, start, digest in raw["tiles"]:
        _check_counts([*offsets, *sizes, part, start])
        if type(digest) is not str:
            raise TypeError("a tile's digest is not a string")
        tiles.append(Tile(tuple(offsets), tuple(sizes), parts[part], start, math.prod(sizes) * dtype.itemsize, digest))
    return Stored(dtype, tuple(raw["shape"]), tuple(tiles))


def _check_counts(values: Any) -> None:
    """Requires exact integers: a float or a boolean would be accepted in most places and fail later."""
    if type(values) is not list or any(type(value) is not int or not -1 < value < 1 << 63 for value in values):
        raise ValueError("a size or an offset is not a non-negative integer")


def _check(committed: Committed, name: str, tensor: Stored) -> None:
    for tile in tensor.tiles:
        part = committed.parts[tile.part]
        is_inside = tile.start >= 0 and tile.start + tile.size <= part.size and all(size >= 0 for size in tile.sizes)
        spans = zip(tile.offsets, tile.sizes, tensor.shape, strict=True)
        if not is_inside or any(offset < 0 or offset + size > whole for offset, size, whole in spans):
            raise ValueError(f"a tile of {name} is outside the tensor or its part")
        if not part.key.startswith(f"{committed.prefix}/"):
            raise ValueError(f"the part {part.key} belongs to another commit")
    # torch's planner rejected overlaps when this was written, so equal volume means complete.
    if sum(tile.size for tile in tensor.tiles) != tensor.nbytes:
        raise ValueError(f"{name} is not complete")
