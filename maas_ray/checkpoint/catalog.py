"""The checkpoints of one place: which are committed, what is in them, whether they are whole, which are pinned.

<prefix>/<step>/manifest.json                        step, cursor, state, the index of all tiles, digests
<prefix>/<step>/parts-<attempt>/<rank>-<n>.safetensors     tiles; plain safetensors files
<prefix>/<step>/parts-<attempt>/history.json         what was logged so far
<prefix>/../pins/log/…                               steps that retention never removes
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maas_ray.errors import MaasError, NotFound, ObjectCorrupt
from maas_ray.store import manifest
from maas_ray.store.manifest import Committed, list_committed, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sequence import Sequence

KIND = "checkpoint"
HISTORY = "history.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside tensors."""

    step: int
    """Optimizer steps done."""
    cursor: int
    """Global sample position of the next batch."""
    meta: Mapping[str, Any]
    """What the trainer put there: schedule, seeds, layout, metrics."""
    history: list[dict[str, Any]]
    """What was logged so far, oldest first."""


def place(prefix: str, step: int) -> str:
    """Where a step is committed."""
    return f"{prefix}/{step:010d}"


def list_checkpoints(store: ObjectStore, prefix: str) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    return [int(step) for step in list_committed(store, prefix)]


def open_checkpoint(store: ObjectStore, prefix: str, step: int | None = None) -> Committed:
    """Opens a committed checkpoint without reading its parts; the newest by default.

    Raises:
        NotFound: there is no such checkpoint; names those that there are.
        ObjectCorrupt: its manifest is altered.
    """
    steps = list_checkpoints(store, prefix)
    wanted = steps[-1] if step is None and steps else step
    if wanted not in steps:
        there = ", ".join(map(str, steps)) or "none"
        which = "" if step is None else f" of step {step}"
        raise NotFound(f"{prefix} has no committed checkpoint{which}; there is: {there}")
    return open_committed(store, place(prefix, wanted), KIND)


def read_saved(committed: Committed) -> Saved:
    """Everything but the tensors, verified.

    Raises:
        ObjectCorrupt: it is altered, or written by an incompatible version.
    """
    try:
        meta = committed.meta
        return Saved(int(meta["step"]), int(meta["cursor"]), meta["state"], json.loads(committed.read(HISTORY)))
    except (KeyError, TypeError, ValueError) as error:
        raise ObjectCorrupt(f"{committed.prefix} is not a checkpoint that this version reads: {error!r}") from error


def verify(committed: Committed) -> list[MaasError]:
    """Reads every part and checks it against its digests; returns what is wrong (empty: all is well)."""
    from maas_ray.checkpoint.index import read_index

    problems = manifest.verify(committed)
    try:
        read_index(committed)
        read_saved(committed)
    except MaasError as error:
        if str(error) not in map(str, problems):
            problems.append(error)
    return problems


def describe(store: ObjectStore, prefix: str) -> list[dict[str, Any]]:
    """What each committed checkpoint is, oldest first, without reading its parts; one that is damaged says how."""
    pins = pinned(store, prefix)
    found = []
    for step in list_checkpoints(store, prefix):
        about: dict[str, Any] = dict.fromkeys(
            ("committed_s", "num_bytes", "num_tensors", "num_parts", "num_ranks", "layout", "metrics"), 0
        )
        error = None
        try:
            committed = open_committed(store, place(prefix, step), KIND)
            meta = committed.meta
            about = {
                "committed_s": meta["time_s"],
                "num_bytes": sum(part.size for part in committed.parts.values()),
                "num_tensors": len(meta["index"]["tensors"]),
                "num_parts": len(meta["index"]["parts"]),
                "num_ranks": meta["num_ranks"],
                "layout": meta["state"].get("layout"),
                "metrics": meta["state"].get("metrics", {}),
            }
        except MaasError as problem:
            error = str(problem)
        except (KeyError, TypeError, AttributeError):
            error = f"{place(prefix, step)} was written by an incompatible version"
        found.append({"step": step, **about, "is_pinned": step in pins, "error": error})
    return found


def pin(store: ObjectStore, prefix: str, step: int, reason: str) -> None:
    """Keeps a checkpoint from retention for good, for instance because a version was published from it.

    Raises:
        NotFound: there is no such checkpoint, or retention was removing it just now.
    """
    open_checkpoint(store, prefix, step)
    Sequence(store, _pins(prefix)).append(lambda _: {"step": step, "reason": reason})
    open_checkpoint(store, prefix, step)


def pinned(store: ObjectStore, prefix: str) -> set[int]:
    """The steps that are pinned."""
    return {record.event["step"] for record in Sequence(store, _pins(prefix)).read()}


def _pins(prefix: str) -> str:
    parent, _, _ = prefix.rpartition("/")
    return f"{parent}/pins" if parent else "pins"
