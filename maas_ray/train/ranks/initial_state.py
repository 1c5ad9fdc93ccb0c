"""The state with which a rank starts: the newest committed one, else the initial weights of the spec."""

from typing import Any

import torch
import torch.distributed as dist

from maas_ray.checkpoint.catalog import newest_checkpoint, open_checkpoint, read_saved
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.records.runs import checkpoints_prefix
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import MODEL, restore, tensors_of


def restore_newest(
    store: ObstoreStore, spec: TrainSpec, state: TrainState
) -> tuple[int, list[dict[str, Any]], dict[str, float]]:
    """Loads the newest committed state, if any; returns the number of completed steps, the history and the times.

    Rank 0 decides which one: the listings of two ranks may differ by a commit of an attempt that is ending.
    """
    prefix = checkpoints_prefix(spec.run)
    newest = torch.tensor([newest_checkpoint(store, prefix) or 0], device=state.device)
    if dist.is_initialized():
        dist.broadcast(newest, src=0)
    if not int(newest):
        if spec.init is not None:
            load_start(store, spec, state)
        return 0, [], {}
    committed = open_checkpoint(store, prefix, int(newest))
    saved = read_saved(committed)
    numbers = saved.meta.get("optimizer", {})
    restore(state, saved.step, read_index(committed), lambda tensors: load_into(committed, tensors), numbers)
    return saved.step, saved.history, saved.meta.get("seconds", {})


def load_start(store: ObstoreStore, spec: TrainSpec, state: TrainState) -> None:
    """Loads the initial weights of the spec's `init`, if set."""
    from maas_ray.train.state.warm_start import open_start  # late: few runs need it

    if spec.init is None:
        return
    start = open_start(spec.init, store, spec.storage)
    weights = {name.removeprefix(MODEL): tensor for name, tensor in tensors_of(state).items() if name.startswith(MODEL)}
    start.check(spec.model, weights)
    start.load(weights)
    if state.average is not None:
        state.average.update(0)
