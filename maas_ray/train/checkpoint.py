"""Training state, committed or not there at all: safetensors and JSON, no pickle. Knows no process and no loop.

    runs/<run>/checkpoints/<step>/manifest.json     step, cursor, optimizer groups, schedule, seeds, digests
    …/parts-<attempt>/model.safetensors             weights and buffers
    …/parts-<attempt>/optimizer.safetensors         moments by parameter number
    …/parts-<attempt>/history.json                  every loss and validation figure logged so far

Random numbers need no state of their own: every step starts from a seed made of (seed, step, rank), see
`train/loop.py`, so that step and seed say all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from maas_ray.errors import Conflict, NotFound, ObjectCorrupt
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed, Draft, list_committed, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sequence import Sequence
from maas_ray.train.runs import run_prefix

KIND = "checkpoint"
FORMAT = 1
MODEL, OPTIMIZER, HISTORY = "model.safetensors", "optimizer.safetensors", "history.json"


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on.

    Attributes:
        step: optimizer steps done.
        cursor: global sample position of the next batch: the whole state of the data order.
        model: weights and buffers by name.
        optimizer: `torch.optim.Optimizer.state_dict()`.
        schedule: the schedule's `state_dict()`, plain numbers.
        rng: how random numbers are made, `{"scheme": "seed-step-rank", "seed": …}`.
        history: what was logged so far: `{step, loss, lr}` and `{step, validation: {…}}`, oldest first.
    """

    step: int
    cursor: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    rng: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(store: ObjectStore, run: str, state: TrainingState) -> Committed:
    """Commits a state. If this step is committed already (by an attempt that was then lost), that one is kept.

    Raises:
        ObjectCorrupt: this step is committed with other weights, so this is not the same run.
        StoreError: the store failed after bounded retries; nothing is committed.
    """
    model = _pack(state.model)
    moments, groups = _split_optimizer(state.optimizer)
    draft = Draft(store, _prefix(run, state.step), KIND)
    part = draft.put(MODEL, model)
    draft.put(OPTIMIZER, _pack(moments))
    draft.put(HISTORY, canonical_json(state.history))
    meta = {
        "format": FORMAT,
        "step": state.step,
        "cursor": state.cursor,
        "optimizer": groups,
        "schedule": dict(state.schedule),
        "rng": dict(state.rng),
    }
    try:
        return draft.commit(meta)
    except Conflict:
        there = open_checkpoint(store, run, state.step)
        if there.parts[MODEL].sha256 != part.sha256:
            raise ObjectCorrupt(
                f"step {state.step} of run {run!r} is committed with other weights than this attempt computed; "
                "the run is not repeatable on this machine (other hardware, library versions or number of workers?)"
            ) from None
        return there


def load_checkpoint(store: ObjectStore, run: str, step: int | None = None) -> TrainingState:
    """Loads a committed state, the newest by default; every byte is verified.

    Raises:
        NotFound: the run has no such checkpoint.
        ObjectCorrupt: a part is missing, truncated or altered.
    """
    committed = open_checkpoint(store, run, step)
    meta = committed.meta
    if meta.get("format") != FORMAT:
        raise ObjectCorrupt(f"{committed.prefix} has format {meta.get('format')!r}; this version reads {FORMAT}")
    return TrainingState(
        step=meta["step"],
        cursor=meta["cursor"],
        model=_unpack(committed, MODEL),
        optimizer=_join_optimizer(_unpack(committed, OPTIMIZER), meta["optimizer"]),
        schedule=meta["schedule"],
        rng=meta["rng"],
        history=json.loads(committed.read(HISTORY)),
    )


def load_weights(committed: Committed) -> dict[str, torch.Tensor]:
    """Weights and buffers by name, verified, without the optimizer."""
    return _unpack(committed, MODEL)


def open_checkpoint(store: ObjectStore, run: str, step: int | None = None) -> Committed:
    """Opens a committed checkpoint without reading its parts; the newest by default. Raises `NotFound`."""
    steps = list_checkpoints(store, run)
    wanted = steps[-1] if step is None and steps else step
    if wanted not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise NotFound(
            f"run {run!r} has no committed checkpoint{'' if step is None else f' of step {step}'}; there is: {there}"
        )
    return open_committed(store, _prefix(run, wanted), KIND)


def list_checkpoints(store: ObjectStore, run: str) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    return [int(step) for step in list_committed(store, f"{run_prefix(run)}/checkpoints")]


def pin(store: ObjectStore, run: str, step: int, reason: str) -> None:
    """Keeps a checkpoint from retention for good, for instance because a version was published from it."""
    open_checkpoint(store, run, step)
    Sequence(store, f"{run_prefix(run)}/pins").append(lambda _: {"step": step, "reason": reason})


def retain(store: ObjectStore, run: str, keep_last: int) -> list[int]:
    """Drops all but the newest `keep_last` committed checkpoints and the pinned ones; returns the dropped steps.

    Partial attempts are not counted, so a crash can never push a good checkpoint out.
    """
    pinned = {record.event["step"] for record in Sequence(store, f"{run_prefix(run)}/pins").read()}
    steps = list_checkpoints(store, run)
    dropped = [step for step in steps[: -max(keep_last, 1)] if step not in pinned]
    for step in dropped:
        open_committed(store, _prefix(run, step), KIND).delete()
    return dropped


def _prefix(run: str, step: int) -> str:
    return f"{run_prefix(run)}/checkpoints/{step:010d}"


def _pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    # Clones: tied weights share memory, which safetensors refuses, and a GPU tensor has to come over first.
    data: bytes = safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    )
    return data


def _unpack(committed: Committed, name: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(committed.read(name))
    except SafetensorError as error:
        raise ObjectCorrupt(f"{committed.parts[name].key} is not a safetensors file: {error}") from error
    return tensors


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors as `<parameter>.<name>`; everything else (groups, numbers, None) as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                plain.setdefault(str(parameter), {})[name] = value
    return tensors, {"groups": state["param_groups"], "plain": plain}


def _join_optimizer(tensors: Mapping[str, torch.Tensor], groups: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(parameter): dict(values) for parameter, values in groups["plain"].items()}
    for key, value in tensors.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    return {"state": state, "param_groups": groups["groups"]}
