"""The state of any optimizer as named tensors and numbers, and back. Independent of models and checkpoints.

Built-in optimizers keep tensors of each parameter only. Others may also keep numbers of a parameter, which become
tensors of no dimension, and numbers of a parameter group, which are JSON.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maas_ray.errors import ModelError, SpecError
from maas_ray.train.optim.optimizer import LABEL, is_imported

Named = Iterable[tuple[str, nn.Parameter]]
"""Parameters with their names in the whole model."""
Numbers = Mapping[str, Mapping[str, float]]
"""Numbers of parameter groups, by the label of the group."""

_OF_SCHEDULE = {"lr", "initial_lr"}


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, Tensor]:
    """The state of each parameter, by `<name>.<key>`."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = value
            elif isinstance(value, bool | int | float) and is_imported(optimizer):
                found[f"{name}.{key}"] = torch.tensor(
                    value, dtype=torch.float64 if isinstance(value, float) else torch.int64
                )
    return found


def group_numbers(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """The numbers of an imported optimizer's groups, without learning rates; empty for built-in ones."""
    if not is_imported(optimizer):
        return {}
    return {
        group[LABEL]: {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in _OF_SCHEDULE and (isinstance(value, bool | int | float) or _is_number(value))
        }
        for group in optimizer.param_groups
    }


def make_state(optimizer: torch.optim.Optimizer, parameters: Named, keys: Mapping[str, Iterable[str]]) -> None:
    """Creates the state of a new optimizer, to be filled in place.

    Args:
        optimizer: an optimizer without state.
        parameters: its parameters.
        keys: the keys of the state that each parameter has had, by its name.
    """
    owners = [(parameter, keys[name]) for name, parameter in parameters if keys.get(name)]
    if is_imported(optimizer):
        if owners:
            _take_empty_step(optimizer, [parameter for parameter, _ in owners])
        return
    is_fused = {
        parameter: bool(group.get("fused")) for group in optimizer.param_groups for parameter in group["params"]
    }
    for parameter, names in owners:
        for name in names:
            optimizer.state[parameter][name] = _moment(name, parameter, is_fused[parameter])


def fill_numbers(
    optimizer: torch.optim.Optimizer, parameters: Named, tensors: Mapping[str, Tensor], groups: Numbers
) -> None:
    """Restores the numbers of an imported optimizer.

    Args:
        optimizer: result of `make_state`.
        parameters: its parameters.
        tensors: result of `state_tensors`, filled.
        groups: result of `group_numbers`.
    """
    if not is_imported(optimizer):
        return
    for name, parameter in parameters:
        of_parameter = optimizer.state.get(parameter, {})
        for key, value in of_parameter.items():
            if isinstance(value, bool | int | float):
                of_parameter[key] = type(value)(tensors[f"{name}.{key}"].item())
    for group in optimizer.param_groups:
        for key, number in groups.get(group[LABEL], {}).items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(number)
            else:
                group[key] = number


def refuse_state(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuses state that a checkpoint cannot contain, after a first step.

    Raises:
        SpecError: with the key and the type of the value.
        ModelError: the weight is split over ranks, and the state is not split the same way.
    """
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value is None or isinstance(value, bool | int | float):
                continue
            if not isinstance(value, Tensor):
                raise SpecError(
                    f"optimizer.name: {name} keeps a {type(value).__name__} as state[{key!r}], which checkpoints do not "
                    "contain; keep tensors or numbers"
                )
            if isinstance(parameter, DTensor) and (value.dim() or isinstance(value, DTensor)):
                fits = isinstance(value, DTensor) and value.shape == parameter.shape
                if not fits or value.placements != parameter.placements:  # type: ignore[attr-defined]
                    raise ModelError(
                        f"optimizer.name: {name} keeps state[{key!r}] of the shape {list(value.shape)} for a weight "
                        f"{list(parameter.shape)} that is split over ranks; its state must have the shape and the split of "
                        "the weight; use a layout of replicas (dp_replicate), or another optimizer"
                    )


def _take_empty_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Makes the optimizer create its state: one step with gradients of zero at a learning rate of zero.

    As torch.distributed.checkpoint does. The weights and the state are then overwritten from the checkpoint.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


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


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.dim() and not isinstance(value, DTensor)
