"""Loads tensors into any layout: each rank reads and verifies only the tiles that it needs.

Every rank loads independently, without communication. Nothing is executed: no data is pickled.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from maas_ray.checkpoint.copying import copy_box, wait_for_copies
from maas_ray.checkpoint.index import Stored, Tile, metadata, read_index
from maas_ray.errors import ModelError, NotFound, ObjectCorrupt
from maas_ray.store.manifest import Committed, piece_digest

REQUEST_BYTES = 8 << 20
"""Adjacent tiles are fetched in one request of about this size."""

IN_FLIGHT = 4


@dataclass(frozen=True)
class _TileRead:
    """Adjacent tiles of one part, and the targets of their values."""

    part: str
    tiles: tuple[Tile, ...]

    @property
    def span(self) -> tuple[int, int]:
        return self.tiles[0].start, self.tiles[-1].start + self.tiles[-1].size


def load_into(committed: Committed, tensors: Mapping[str, Tensor]) -> int:
    """Fills tensors in place; ignores other names in the checkpoint.

    Args:
        committed: an open checkpoint.
        tensors: by the names under which they were saved; torch Tensors are filled whole, of a DTensor this rank's
            part, independent of the layout in which it was saved.

    Returns:
        Bytes read from parts.

    Raises:
        ModelError: a name is missing in the checkpoint, or has another shape or type; nothing is filled.
        ObjectCorrupt: a part is missing, truncated or altered; tensors may be partially filled: do not use them.
    """
    index = read_index(committed)
    _check_fit(committed, index, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata(index), True)
    wanted: dict[Tile, list[tuple[ReadItem, Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for item in planner.finish_plan(planner.create_local_plan()).items:
            tile = index[item.storage_index.fqn].tiles[item.storage_index.index or 0]
            wanted[tile].append((item, planner.resolve_tensor(item).detach()))
    reads = _merge(wanted)
    _check_sizes(committed, {read.part for read in reads})

    def fetch(read: _TileRead) -> int:
        start, stop = read.span
        data = memoryview(_range(committed, read.part, start, stop))
        for tile in read.tiles:
            values = data[tile.start - start : tile.start - start + tile.size]
            if not is_intact(values, tile):
                key = committed.parts[tile.part].key
                raise ObjectCorrupt(
                    f"the committed object {key} is altered between bytes {tile.start} and {tile.start + tile.size}; "
                    "not used"
                )
            _place(values, tile, wanted[tile])
        return stop - start

    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="checkpoint-read") as pool:
        num_bytes = sum(pool.map(fetch, reads))
    wait_for_copies(target for targets in wanted.values() for _, target in targets)
    return num_bytes


def read_tensors(committed: Committed, prefix: str = "model.") -> dict[str, Tensor]:
    """Reads whole tensors into this process's memory, for export and evaluation.

    Args:
        committed: an open checkpoint.
        prefix: prefix of the names to read; it is removed from the result's names.

    Raises:
        ObjectCorrupt: a part is missing, truncated or altered.
    """
    index = read_index(committed)
    tensors = {
        name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in index.items() if name.startswith(prefix)
    }
    load_into(committed, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def is_intact(values: memoryview, tile: Tile) -> bool:
    """Whether the values of a tile have its digest."""
    return piece_digest(values).hex() == tile.digest


def _check_fit(committed: Committed, index: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(name for name in tensors if name not in index)
    if missing:
        raise ModelError(
            f"{committed.prefix} does not contain {missing[0]!r} ({len(missing)} of {len(tensors)} requested tensors "
            "are missing); load it with the model that was saved"
        )
    for name, tensor in tensors.items():
        there = index[name]
        if (tuple(tensor.shape), tensor.dtype) != (there.shape, there.dtype):
            raise ModelError(
                f"{committed.prefix} contains {name!r} as {there.dtype} of shape {list(there.shape)}; "
                f"requested {tensor.dtype} of shape {list(tensor.shape)}; load it with the model that was saved"
            )
        if tensor.is_meta:
            raise ModelError(f"{name!r} has no memory to load into (device meta); materialize it first")


def _check_sizes(committed: Committed, parts: set[str]) -> None:
    """Detects truncated, grown and missing parts with one listing, before a byte is read."""
    there = {info.key: info.size for info in committed.store.scan(committed.prefix)}
    for name in sorted(parts):
        part = committed.parts[name]
        if part.key not in there:
            raise ObjectCorrupt(f"the committed object {part.key} is missing; restore it or remove {committed.prefix}")
        if there[part.key] != part.size:
            raise ObjectCorrupt(
                f"the committed object {part.key} has {there[part.key]} bytes instead of {part.size}; not used"
            )


def _merge(tiles: Mapping[Tile, object]) -> list[_TileRead]:
    reads: list[_TileRead] = []
    group: list[Tile] = []
    for tile in sorted((tile for tile in tiles if tile.size), key=lambda tile: (tile.part, tile.start)):
        last = group[-1] if group else tile
        is_next = group and (tile.part, tile.start) == (last.part, last.start + last.size)
        if group and not (is_next and tile.start + tile.size - group[0].start <= REQUEST_BYTES):
            reads.append(_TileRead(last.part, tuple(group)))
            group = []
        group.append(tile)
    return [*reads, _TileRead(group[0].part, tuple(group))] if group else reads


def _range(committed: Committed, part: str, start: int, stop: int) -> bytes:
    key = committed.parts[part].key
    try:
        (data,) = committed.store.get_ranges(key, [(start, stop)])
    except NotFound as error:
        raise ObjectCorrupt(
            f"the committed object {key} is missing; restore it or remove {committed.prefix}"
        ) from error
    if len(data) != stop - start:
        raise ObjectCorrupt(f"the committed object {key} ends before byte {stop}; not used")
    return data


def _place(values: memoryview, tile: Tile, targets: Sequence[tuple[ReadItem, Tensor]]) -> None:
    for item, target in targets:
        box = [slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True)]
        copy_box(target, values, tile.sizes, box)
