"""Reads and restores training state by name, on any layout.

    model.<name>                  weights and buffers, by their names in the whole model
    optimizer.<name>.<moment>     the optimizer's moments of this weight
    ema.<name>                    the moving average of this weight, if the run keeps it

Values are tensors, or DTensors of which each rank has a part; different pipeline stages have different names.
Learning rates and other numbers of the optimizer are not state: the spec and the step determine them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from maas_ray.errors import ObjectCorrupt
from maas_ray.train.loop.fit import TrainState

MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """The state of this rank's parts, by name."""
    found: dict[str, Tensor] = {}
    for part in state.parts:
        found.update({f"{MODEL}{name}": value for name, value in part.state_dict().items()})
    for name, parameter in _parameters(state):
        for moment, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{OPTIMIZER}{name}.{moment}"] = value
    if state.ema is not None:
        found.update({f"{EMA}{name}": average for name, average in state.ema.averages.items()})
    return found


def buffers_of(state: TrainState) -> set[str]:
    """The names of the buffers among the state."""
    return {f"{MODEL}{name}" for part in state.parts for name, _ in part.named_buffers()}


def restore(state: TrainState, step: int, names: Iterable[str], load: Callable[[Mapping[str, Tensor]], Any]) -> None:
    """Restores the state after `step` steps.

    Args:
        state: a new state, on any layout.
        step: number of completed optimizer steps.
        names: all names in the checkpoint.
        load: fills tensors in place.

    Raises:
        ObjectCorrupt: the checkpoint lacks a weight of the model.
    """
    there = set(names)
    moments: dict[str, set[str]] = {}
    for name in there:
        if name.startswith(OPTIMIZER):
            owner, _, moment = name.removeprefix(OPTIMIZER).rpartition(".")
            moments.setdefault(owner, set()).add(moment)
    is_fused = bool(state.optimizer.defaults.get("fused"))
    for name, parameter in _parameters(state):
        for moment in moments.get(name, ()):
            state.optimizer.state[parameter][moment] = _moment(moment, parameter, is_fused)
    wanted = tensors_of(state)
    if missing := sorted(wanted.keys() - there):
        raise ObjectCorrupt(
            f"the checkpoint has no {missing[0]} (and {len(missing) - 1} others); it belongs to another model"
        )
    with torch.no_grad():
        load(wanted)
    _set_step(state, step)


def _moment(name: str, parameter: Tensor, is_fused: bool) -> Tensor:
    # The step count is one number, on the CPU unless the kernel is fused; other moments have the parameter's shape.
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device if is_fused else "cpu")
    data = parameter.detach()
    return (
        torch.zeros_like(data, memory_format=torch.preserve_format)
        if isinstance(data, DTensor)
        else torch.zeros_like(data)
    )


def _set_step(state: TrainState, step: int) -> None:
    schedule: Any = state.schedule
    factors = [factor(step) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._step_count, schedule._last_lr = step, step + 1, rates


def _parameters(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for part in state.parts for pair in part.named_parameters()]
