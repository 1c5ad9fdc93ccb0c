"""Saves a state from all ranks: parts first, agreement, then one manifest. Keeps no threads between saves."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from maas_ray.checkpoint.catalog import HISTORY, KIND, place
from maas_ray.checkpoint.collectives import TIMEOUT_S, Collectives
from maas_ray.checkpoint.index import FORMAT, Stored, Tile, tensors_digest, write_index
from maas_ray.checkpoint.plan import Planner, SaveAttempt, refuse
from maas_ray.checkpoint.upload import Filled, UploadSource, Written, upload
from maas_ray.errors import Conflict, MaasError, ObjectCorrupt, SaveFailed
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed, CommitWriter, open_committed, part_key
from maas_ray.store.objects import ObjectStore

Fence = Callable[[], None]
"""Raises `Conflict` if another process has taken over, see `Claim.check`."""


@dataclass(frozen=True)
class Snapshot:
    """The complete state that the next step depends on.

    Attributes:
        step: optimizer steps done.
        cursor: global sample position of the next batch.
        tensors: by flat names, such as `model.<name>` and `optimizer.<name>.<moment>`: torch Tensors that are equal on
            all ranks with that name, or DTensors. Ranks may have different names (pipeline stages).
        meta: JSON; rank 0's is stored. Retention ranks by `metrics` (name to number); `layout` describes how the run is
            distributed over ranks, see `save`.
        history: JSON; the training history so far; rank 0's is stored.
    """

    step: int
    cursor: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def save(
    store: ObjectStore,
    prefix: str,
    snapshot: Snapshot,
    group: dist.ProcessGroup | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Committed:
    """Commits a state at `<prefix>/<step>`; every rank of the group calls it and gets the same result.

    A step that is already committed, by an attempt that was then lost, is kept if it contains the same values.

    Args:
        store: where to write.
        prefix: prefix of the run's checkpoints.
        snapshot: this rank's part of the state.
        group: the ranks that have the state, see `saving_group`; None: this process has all of it.
        timeout_s: longest time for writing the parts. The longest wait for another rank is the group's own timeout.

    Raises:
        SaveFailed: a rank could not write, or did not respond; no rank treats the state as committed. The message names
            the rank and the object.
        ObjectCorrupt: the step is committed with other values although `meta["layout"]` and the number of ranks are the
            same, so this is not the same run. (Other layouts add in another order and differ in the last bits: then
            the committed state is kept.)
    """
    collectives = Collectives(group)
    attempt = Planner(collectives).prepare(snapshot.step, snapshot.tensors)
    finish(store, prefix, collectives, attempt, snapshot, Filled(attempt.pieces), timeout_s)
    return open_committed(store, place(prefix, snapshot.step), KIND)


def finish(
    store: ObjectStore,
    prefix: str,
    collectives: Collectives,
    attempt: SaveAttempt,
    snapshot: Snapshot,
    source: UploadSource,
    timeout_s: float,
    in_flight: int | None = None,
    fence: Fence | None = None,
) -> None:
    """Writes this rank's parts and agrees with the other ranks on the outcome of an attempt.

    Raises as `save`, and `Conflict` if the fence detects that another process has taken over.
    """
    where = place(prefix, attempt.step)
    written: list[Written] = []
    failure = None
    try:
        written = upload(store, where, attempt, source, timeout_s, in_flight)
    except Exception as error:  # the other ranks must receive every error
        failure = f"rank {collectives.rank}: {error}"
    everybody = collectives.gather((written, failure))
    outcome = _Outcome()
    if collectives.rank == 0:
        outcome = _decide(store, where, attempt, snapshot, everybody, fence)
    outcome = collectives.broadcast(outcome)
    if outcome.error is None:
        return
    if not outcome.may_be_committed:
        _remove(store, [part_key(where, attempt.name, layout.name) for layout in attempt.layouts])
    raise outcome.error


@dataclass(frozen=True)
class _Outcome:
    error: MaasError | None = None
    may_be_committed: bool = False
    """Whether the manifest was sent without a response: its parts must be kept."""


def _decide(
    store: ObjectStore,
    where: str,
    attempt: SaveAttempt,
    snapshot: Snapshot,
    everybody: list[tuple[list[Written], str | None]],
    fence: Fence | None,
) -> _Outcome:
    try:
        refuse(failure for _, failure in everybody)
        written = [each for some, _ in everybody for each in some]
        index = _index(attempt, written)
        writer = CommitWriter(store, where, KIND, attempt.name)
        for each in written:
            writer.add(each.layout.name, each.part)
        state = json.loads(canonical_json(snapshot.meta))  # rejected here, while nothing is committed
        writer.put(HISTORY, canonical_json(snapshot.history))
        meta = {
            "format": FORMAT,
            "step": snapshot.step,
            "cursor": snapshot.cursor,
            "time_s": time.time(),
            "num_ranks": len(everybody),
            "tensors_sha256": tensors_digest(index),
            "state": state,
            "index": write_index(index, [each.layout.name for each in written]),
        }
    except SaveFailed as error:
        return _Outcome(error)
    except Exception as error:  # the other ranks wait for a response in any case
        _remove(store, [part_key(where, attempt.name, HISTORY)])
        return _Outcome(SaveFailed(f"the checkpoint was aborted, nothing is committed: rank 0, {where}: {error}"))
    if fence is None:
        return commit(store, where, writer, meta)
    return _commit_fenced(store, where, writer, meta, fence)


def _commit_fenced(
    store: ObjectStore, where: str, writer: CommitWriter, meta: Mapping[str, Any], fence: Fence
) -> _Outcome:
    """Checks the fence before and after the commit: another process may take over during a slow put."""
    try:
        fence()
    except Exception as error:
        _remove(store, [part_key(where, writer.attempt, HISTORY)])
        refused = (
            error if isinstance(error, Conflict) else SaveFailed(f"rank 0 could not check the run's owner: {error}")
        )
        return _Outcome(refused)
    outcome = commit(store, where, writer, meta)
    if outcome.error is None:
        try:
            fence()
        except Conflict as error:
            with contextlib.suppress(MaasError):
                if (there := open_committed(store, where, KIND)).attempt == writer.attempt:
                    there.delete()
            return _Outcome(error)
        except MaasError:
            pass  # this process was the owner just before, and the store cannot be read
    return outcome


def commit(store: ObjectStore, where: str, writer: CommitWriter, meta: Mapping[str, Any]) -> _Outcome:
    """Commits what was uploaded; an error of the store becomes part of the outcome."""
    try:
        writer.commit(meta)
    except Conflict:
        return _Outcome(_compare(store, where, meta))
    except Exception as error:
        with contextlib.suppress(MaasError):
            there = open_committed(store, where, KIND)
            if there.meta["tensors_sha256"] == meta["tensors_sha256"]:
                return _Outcome()  # it was written, only the response was lost
        reason = f"rank 0 does not know whether {where} was committed, its parts are kept: {error}"
        return _Outcome(SaveFailed(reason), may_be_committed=True)
    return _Outcome()


def _compare(store: ObjectStore, where: str, meta: Mapping[str, Any]) -> MaasError | None:
    """Compares the state that another attempt committed with ours, whose parts are removed by then."""
    try:
        there = open_committed(store, where, KIND).meta
    except MaasError as error:
        return SaveFailed(f"rank 0 cannot read the checkpoint that another attempt committed at {where}: {error}")
    if there.get("tensors_sha256") == meta["tensors_sha256"]:
        return None
    if (there.get("num_ranks"), there.get("state", {}).get("layout")) != (
        meta["num_ranks"],
        meta["state"].get("layout"),
    ):
        return None
    return ObjectCorrupt(
        f"{where} is already committed with weights that differ from those of this attempt; "
        "the run is not repeatable on this machine (other hardware or library versions?)"
    )


def _index(attempt: SaveAttempt, written: list[Written]) -> dict[str, Stored]:
    """All tensors with their tiles; rank 0 has the description of every part by now."""
    tiles: dict[str, list[Tile]] = {}
    for each in written:
        for slot, digest in zip(each.layout.slots, each.digests, strict=True):
            tile = Tile(slot.offsets, slot.sizes, each.layout.name, slot.start, slot.size, digest)
            tiles.setdefault(slot.tensor, []).append(tile)
    if attempt.shapes is None:
        raise SaveFailed("rank 0 has no plan; nothing is committed")
    index = {
        name: Stored(data.properties.dtype, tuple(data.size), tuple(tiles[name]))
        for name, data in attempt.shapes.state_dict_metadata.items()
        if isinstance(data, TensorStorageMetadata)
    }
    for name, stored in index.items():  # torch's planner checks this only for several ranks
        if sum(tile.size for tile in stored.tiles) != stored.nbytes:
            raise SaveFailed(f"the ranks of this group do not have all of {name}; nothing is committed")
    return index


def _remove(store: ObjectStore, keys: list[str]) -> None:
    """Removes objects if the store is available; others are orphans that fsck collects."""
    with contextlib.suppress(MaasError):
        store.delete(keys)
