"""Training state by name, whatever the layout: what a checkpoint holds, and how a TrainState gets it back.

    model.<name>                  weights and buffers, by their names in the whole model
    optimizer.<name>.<moment>     what the optimizer keeps for this weight
    ema.<name>                    the moving average of this weight, in a run that keeps one

Values are tensors, or DTensors of which each rank has a piece; the ranks of other pipeline stages have other names.
Learning rates and other numbers of the optimizer are not state: they follow from the spec and the step.
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
    """Which of those names are of buffers."""
    return {f"{MODEL}{name}" for part in state.parts for name, _ in part.named_buffers()}


def restore(state: TrainState, step: int, names: Iterable[str], load: Callable[[Mapping[str, Tensor]], Any]) -> None:
    """Gives a TrainState the state after `step` steps.

    Args:
        state: freshly built, on any layout.
        step: optimizer steps that the state has done.
        names: all names that the checkpoint has.
        load: fills the tensors that it is given, in place.

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
            f"the checkpoint has no {missing[0]} (and {len(missing) - 1} others); it is of another model"
        )
    with torch.no_grad():
        load(wanted)
    _set_step(state, step)


def _moment(name: str, parameter: Tensor, is_fused: bool) -> Tensor:
    # One number, the count of steps, is on the CPU unless the kernel counts; all else has the shape of the parameter.
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
