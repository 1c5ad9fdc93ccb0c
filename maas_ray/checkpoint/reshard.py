"""Rewrites a committed checkpoint in one process as whole tensors, in parts that any safetensors reader accepts."""

import itertools
import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from maas_ray.checkpoint.catalog import KIND, list_checkpoints, place, read_saved
from maas_ray.checkpoint.collectives import Collectives
from maas_ray.checkpoint.copying import new_buffer
from maas_ray.checkpoint.index import Stored, metadata, read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.parts import PartLayout, fill_header, lay_out_part
from maas_ray.checkpoint.pieces import TensorPiece
from maas_ray.checkpoint.plan import SaveAttempt
from maas_ray.checkpoint.save import Snapshot, finish
from maas_ray.errors import Conflict
from maas_ray.store.manifest import Committed, open_committed
from maas_ray.store.objects import ObjectStore

PART_BYTES = 1 << 30
TIMEOUT_S = 24 * 3600.0


def reshard(committed: Committed, store: ObjectStore, prefix: str, num_parts: int | None = None) -> Committed:
    """Commits the same state at `<prefix>/<step>` under another prefix, with every tensor in one piece.

    One part is in memory at a time. The values, the state and the history are unchanged.

    Args:
        committed: the checkpoint to read; every byte is verified.
        store: where to write.
        prefix: prefix for the result; not the one of the source.
        num_parts: maximum number of parts of about equal size; by default as many as parts of 1 GiB need.

    Raises:
        Conflict: this step is already committed under the prefix.
        ObjectCorrupt: a part is missing, truncated or altered.
        SaveFailed: the store failed; nothing is committed.
    """
    saved = read_saved(committed)
    if saved.step in list_checkpoints(store, prefix):
        raise Conflict(f"step {saved.step} is already committed at {prefix} in {store.uri}; choose another prefix")
    index = read_index(committed)
    total = sum(stored.nbytes for stored in index.values())
    layouts = _layouts(index, num_parts or max(1, math.ceil(total / PART_BYTES)))
    attempt = SaveAttempt(saved.step, uuid.uuid4().hex, {}, layouts, metadata(index))
    snapshot = Snapshot(saved.step, saved.cursor, {}, saved.meta, saved.history)
    finish(store, prefix, Collectives(None), attempt, snapshot, _RefilledParts(committed), TIMEOUT_S, in_flight=1)
    return open_committed(store, place(prefix, saved.step), KIND)


class _RefilledParts:
    """Parts that are filled from a checkpoint."""

    def __init__(self, committed: Committed) -> None:
        self._committed = committed

    @contextmanager
    def lend(self, number: int, layout: PartLayout) -> Iterator[Tensor]:
        buffer = new_buffer(layout.size)
        fill_header(layout, buffer)
        load_into(self._committed, {slot.tensor: slot.values(buffer) for slot in layout.slots})
        yield buffer


def _layouts(index: Mapping[str, Stored], num_parts: int) -> tuple[PartLayout, ...]:
    total = sum(stored.nbytes for stored in index.values()) or 1
    groups: list[list[str]] = [[] for _ in range(num_parts)]
    before = 0
    for name, stored in sorted(index.items()):
        groups[min(before * num_parts // total, num_parts - 1)].append(name)
        before += stored.nbytes
    groups = [group for group in groups if group]
    names = (f"{number:05d}-of-{len(groups):05d}.safetensors" for number in itertools.count(1))
    return tuple(
        lay_out_part(name, [item for each in group for item in _whole(each, index[each])])
        for name, group in zip(names, groups, strict=False)
    )


def _whole(name: str, stored: Stored) -> list[WriteItem]:
    shape = stored.shape
    nothing = torch.empty(shape, dtype=stored.dtype, device="meta")
    return TensorPiece(shape, ((0,) * len(shape), shape), nothing, is_tiled=False).__create_write_items__(name, None)
