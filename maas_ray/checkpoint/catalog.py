"""The committed checkpoints under one prefix: listing, opening, verification and pins.

<prefix>/<step>/manifest.json                        step, cursor, state, the index of all tiles, digests
<prefix>/<step>/parts-<attempt>/<rank>-<n>.safetensors     tiles; plain safetensors files
<prefix>/<step>/parts-<attempt>/history.json         the training history so far
<prefix>/../pins/log/…                               steps that retention never removes
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from maas_ray.errors import MaasError, NotFound, ObjectCorrupt
from maas_ray.store import manifest
from maas_ray.store.fetch import in_parallel
from maas_ray.store.manifest import Committed, is_committed, list_committed, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, Time, parse_json, read_document
from maas_ray.store.sequence import Record, Sequence
from maas_ray.suggestions import known_names

KIND = "checkpoint"
HISTORY = "history.json"
_STEP = re.compile(r"\d{10,18}")
PINS = re.compile(r"(.+/)?pins")
"""Prefixes of the logs of pins."""


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint except for tensors."""

    step: int
    """Optimizer steps done."""
    cursor: int
    """Global sample position of the next batch."""
    meta: Mapping[str, Any]
    """The trainer's state: schedule, seeds, layout, metrics."""
    history: list[dict[str, Any]]
    """The training history so far, oldest first."""


def place(prefix: str, step: int) -> str:
    """The prefix under which a step is committed."""
    return f"{prefix}/{step:010d}"


def list_checkpoints(store: ObjectStore, prefix: str) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    found = [int(step) for step in list_committed(store, prefix) if _STEP.fullmatch(step)]
    return sorted(step for step in found if step >= 0)


def open_checkpoint(store: ObjectStore, prefix: str, step: int | None = None) -> Committed:
    """Opens a committed checkpoint without reading its parts; the newest by default.

    Raises:
        NotFound: there is no such checkpoint; the message names the existing ones.
        ObjectCorrupt: its manifest is altered or malformed.
    """
    wanted = newest_checkpoint(store, prefix) if step is None else step
    if wanted is not None:
        try:
            return open_step(store, prefix, wanted)
        except NotFound:
            pass  # reported below, with the existing ones
    steps = list_checkpoints(store, prefix)
    if step is None and steps:
        return open_step(store, prefix, steps[-1])  # retention has just removed the previous one
    if not steps:
        raise NotFound(f"{prefix} has no committed checkpoint yet")
    there = known_names("", list(map(str, steps)), "steps", "maas-ray checkpoints list")
    raise NotFound(f"{prefix} has no committed checkpoint of step {step}; {there}")


def newest_checkpoint(store: ObjectStore, prefix: str) -> int | None:
    """The step of the newest committed checkpoint; None: there is none. Needs two listings for any number of steps."""
    for name in sorted(filter(_STEP.fullmatch, store.children(prefix)), key=int, reverse=True):
        if is_committed(store, f"{prefix}/{name}"):
            return int(name)
    return None


def open_step(store: ObjectStore, prefix: str, step: int) -> Committed:
    """Opens a checkpoint by its step; as `open_checkpoint`, but without a listing."""
    committed = open_committed(store, place(prefix, step), KIND)
    said = read_document(_CheckpointMeta, committed.meta, f"{committed.prefix}/{manifest.NAME}")
    if said.step != step:
        raise ObjectCorrupt(f"{committed.prefix} contains step {said.step}, not the step in its name; not used")
    return committed


def read_saved(committed: Committed) -> Saved:
    """Everything but the tensors, verified.

    Raises:
        ObjectCorrupt: it is altered, or was written by an incompatible version.
    """
    what = f"the history of {committed.prefix}"
    said = read_document(_CheckpointMeta, committed.meta, f"{committed.prefix}/{manifest.NAME}")
    if HISTORY not in committed.parts:
        raise ObjectCorrupt(f"{committed.prefix} has no {HISTORY}; not used")
    history = parse_json(committed.read(HISTORY), what)
    read_document(_History, {"entries": history}, what)
    return Saved(said.step, said.cursor, committed.meta["state"], history)


def verify(committed: Committed) -> list[MaasError]:
    """Reads every part and checks it against its digests; returns the errors (empty: the checkpoint is sound)."""
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
    """Describes each committed checkpoint, oldest first, without reading its parts; includes errors of damaged ones."""
    pins = pinned(store, prefix)
    steps = list_checkpoints(store, prefix)
    found = in_parallel(lambda step: _describe(store, prefix, step), steps)
    return [
        {"step": step, **about, "is_pinned": step in pins, "error": error}
        for step, (about, error) in zip(steps, found, strict=True)
    ]


def _describe(store: ObjectStore, prefix: str, step: int) -> tuple[dict[str, Any], str | None]:
    """The description of one checkpoint, and its error."""
    about: dict[str, Any] = dict.fromkeys(
        ("committed_s", "num_bytes", "num_tensors", "num_parts", "num_ranks", "layout", "metrics"), 0
    )
    try:
        committed = open_step(store, prefix, step)
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
        return about, str(problem)
    except (KeyError, TypeError, AttributeError):
        return about, f"{place(prefix, step)} was written by an incompatible version"
    return about, None


def pin(store: ObjectStore, prefix: str, step: int, reason: str) -> None:
    """Excludes a checkpoint from retention permanently, for instance because a version was published from it.

    Raises:
        NotFound: there is no such checkpoint, or retention has just removed it.
    """
    open_checkpoint(store, prefix, step)
    if step not in pinned(store, prefix):  # a retry finds its own record
        Sequence(store, _pins(prefix)).append(lambda _: {"step": step, "reason": reason})
    open_checkpoint(store, prefix, step)


def pinned(store: ObjectStore, prefix: str) -> set[int]:
    """The pinned steps."""
    return {read_pin(record).step for record in Sequence(store, _pins(prefix)).read()}


class Pin(Document):
    """A step that retention never removes."""

    step: Count
    reason: str


def read_pin(record: Record) -> Pin:
    """The pin in a record. Raises `ObjectCorrupt`."""
    return read_document(Pin, record.event, f"the log record {record.key}")


def check_checkpoint(committed: Committed) -> Iterator[MaasError]:
    """The errors in a checkpoint whose parts are intact; for `fsck`."""
    from maas_ray.checkpoint.index import read_index

    for check in (read_saved, read_index):
        try:
            check(committed)
        except MaasError as error:
            yield error


class _State(Document):
    layout: str | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)


class _CheckpointMeta(Document):
    step: Count
    cursor: Count
    time_s: Time
    num_ranks: Count
    tensors_sha256: str
    state: _State


class _Entry(Document):
    step: Count
    loss: float | None = None
    lr: float | None = None
    validation: dict[str, float] = Field(default_factory=dict)


class _History(Document):
    entries: list[_Entry]


def _pins(prefix: str) -> str:
    parent, _, _ = prefix.rpartition("/")
    return f"{parent}/pins" if parent else "pins"
