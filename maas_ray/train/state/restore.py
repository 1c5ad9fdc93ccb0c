"""Reads and restores training state by name, on any layout.

    model.<name>                  weights and buffers, by their names in the whole model
    optimizer.<name>.<moment>     the optimizer's moments of this weight
    ema.<name>                    the average of this weight, if the run keeps one

Values are tensors, or DTensors of which each rank has a part; different pipeline stages have different names.
Learning rates are not state: the spec and the step determine them. Numbers of an imported optimizer's parameter groups
are a part of the checkpoint's meta data.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from maas_ray.errors import ObjectCorrupt
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.optim.state import Numbers, fill_numbers, make_state, state_tensors

MODEL, OPTIMIZER, AVERAGE = "model.", "optimizer.", "ema."


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """The state of this rank's parts, by name."""
    found: dict[str, Tensor] = {}
    for part in state.parts:
        found.update({f"{MODEL}{name}": value for name, value in part.state_dict().items()})
    moments = state_tensors(state.optimizer, _parameters(state))
    found.update({f"{OPTIMIZER}{name}": value for name, value in moments.items()})
    if state.average is not None:
        found.update({f"{AVERAGE}{name}": average for name, average in state.average.averages.items()})
    return found


def buffers_of(state: TrainState) -> set[str]:
    """The names of the buffers among the state."""
    return {f"{MODEL}{name}" for part in state.parts for name, _ in part.named_buffers()}


def restore(
    state: TrainState,
    step: int,
    names: Iterable[str],
    load: Callable[[Mapping[str, Tensor]], Any],
    numbers: Numbers | None = None,
) -> None:
    """Restores the state after `step` steps.

    Args:
        state: a new state, on any layout.
        step: number of completed optimizer steps.
        names: all names in the checkpoint.
        load: fills tensors in place.
        numbers: the numbers of the optimizer's groups.

    Raises:
        ObjectCorrupt: the checkpoint lacks a weight of the model.
    """
    there = set(names)
    moments: dict[str, set[str]] = {}
    for name in there:
        if name.startswith(OPTIMIZER):
            owner, _, moment = name.removeprefix(OPTIMIZER).rpartition(".")
            moments.setdefault(owner, set()).add(moment)
    make_state(state.optimizer, _parameters(state), moments)
    wanted = tensors_of(state)
    if missing := sorted(wanted.keys() - there):
        raise ObjectCorrupt(
            f"the checkpoint has no {missing[0]} (and {len(missing) - 1} others); it belongs to another model"
        )
    with torch.no_grad():
        load(wanted)
    filled = {name.removeprefix(OPTIMIZER): value for name, value in wanted.items() if name.startswith(OPTIMIZER)}
    fill_numbers(state.optimizer, _parameters(state), filled, numbers or {})
    state.schedule.set_step(step)


def _parameters(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for part in state.parts for pair in part.named_parameters()]
