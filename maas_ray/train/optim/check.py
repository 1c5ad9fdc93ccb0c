"""Checks a user's optimizer on small weights before the first step. Independent of the model's data."""

import copy
import json
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from maas_ray.errors import ModelError, SpecError
from maas_ray.train.optim.average import AveragingOptimizer, OptimizerAverage
from maas_ray.train.optim.optimizer import build_optimizer
from maas_ray.train.optim.state import (
    fill_numbers,
    group_numbers,
    make_state,
    refuse_state,
    state_tensors,
)
from maas_ray.train.spec.optim import OptimizerSpec

_SHAPE = (4, 3, 2, 2, 2)
_STEPS = 8
"""Rectified optimizers (RAdam) may change nothing in their first five."""


class _Weights(nn.Module):
    """One weight of each number of dimensions, with values that no two elements share."""

    def __init__(self, dims: Iterable[int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            torch.randn(_SHAPE[:dim], generator=generator) for dim in sorted({min(dim, len(_SHAPE)) for dim in dims})
        )


def check_optimizer(spec: OptimizerSpec, net: nn.Module) -> None:
    """Takes a few steps, and repeats the last ones from the saved state.

    Args:
        spec: a user's optimizer.
        net: the model; the numbers of dimensions of its weights are used.

    Raises:
        SpecError: a step fails, changes nothing or gives NaN; or the state is not what a resumed run needs.
    """
    small = _Weights(weight.dim() for weight in net.parameters())
    optimizer = build_optimizer(spec, small)
    before = [weight.detach().clone() for weight in small.parameters()]
    _steps(spec, optimizer, small, 0)
    for old, weight in zip(before, small.parameters(), strict=True):
        if not bool(weight.isfinite().all()):
            raise SpecError(f"optimizer.name: {spec.name} gives NaN or infinite weights after {_STEPS} steps")
        if torch.equal(old, weight):
            raise SpecError(
                f"optimizer.name: {spec.name} does not change a weight of {weight.dim()} dimension(s) in {_STEPS} steps with "
                f"the learning rate {spec.lr}"
            )
    refuse_state(optimizer, spec.name)
    if isinstance(optimizer, AveragingOptimizer):
        _check_average(spec, optimizer, small)
    resumed = copy.deepcopy(small)
    again = build_optimizer(spec, resumed)
    _restore(optimizer, small, again, resumed)
    for each, weights in ((optimizer, small), (again, resumed)):
        _steps(spec, each, weights, _STEPS)
    if any(not torch.equal(one, other) for one, other in zip(small.parameters(), resumed.parameters(), strict=True)):
        raise SpecError(
            f"optimizer.name: {spec.name} does not continue exactly from its saved state; keep all that a step depends on "
            "as tensors or numbers in state[parameter] or in the parameter groups, not in other attributes"
        )


def _check_average(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, small: nn.Module) -> None:
    """Looks at the average, which every validation and every checkpoint does."""
    before = {name: value.clone() for name, value in state_tensors(optimizer, small.named_parameters()).items()}
    numbers = group_numbers(optimizer)
    averages = OptimizerAverage([small], optimizer).averages  # type: ignore[arg-type]  # checked by the caller
    after = state_tensors(optimizer, small.named_parameters())
    if numbers != group_numbers(optimizer) or any(not torch.equal(after[name], old) for name, old in before.items()):
        raise SpecError(
            f"optimizer.name: {spec.name} changes its state in eval() or train(); the result of a run would depend on the "
            "number of its validations"
        )
    if not all(bool(average.isfinite().all()) for average in averages.values()):
        raise SpecError(f"optimizer.name: {spec.name} gives NaN or infinite weights in eval()")


def check_split_state(spec: OptimizerSpec, mesh: DeviceMesh) -> None:
    """Takes a step with a weight that is split over the ranks of a mesh. Collective.

    Raises:
        ModelError: on every rank; the optimizer does not support such weights.
    """
    placements = [Shard(0)] * mesh.ndim
    whole = torch.ones(2 * mesh.size(), 4, device=mesh.device_type)
    small = nn.ParameterList([nn.Parameter(distribute_tensor(whole, mesh, placements))])
    optimizer = build_optimizer(spec, small)
    for weight in small.parameters():
        weight.grad = distribute_tensor(whole / 2, mesh, placements)
    try:
        optimizer.step()
    except Exception as error:  # a user's code may raise anything
        raise ModelError(
            f"optimizer.name: {spec.name} does not support weights that are split over ranks (DTensor): "
            f"{type(error).__name__}: {str(error).partition('. ')[0]}; use a layout of replicas (dp_replicate), or another optimizer"
        ) from error
    refuse_state(optimizer, spec.name)


def _restore(
    optimizer: torch.optim.Optimizer, small: nn.Module, again: torch.optim.Optimizer, resumed: nn.Module
) -> None:
    """What a checkpoint and a restart do, in memory."""
    saved = state_tensors(optimizer, small.named_parameters())
    numbers = json.loads(json.dumps(group_numbers(optimizer)))
    keys: dict[str, set[str]] = {}
    for name in saved:
        owner, _, key = name.rpartition(".")
        keys.setdefault(owner, set()).add(key)
    make_state(again, resumed.named_parameters(), keys)
    filled = state_tensors(again, resumed.named_parameters())
    with torch.no_grad():
        for name, value in filled.items():
            value.copy_(saved[name])
        for one, other in zip(resumed.parameters(), small.parameters(), strict=True):
            one.copy_(other)
    fill_numbers(again, resumed.named_parameters(), filled, numbers)


def _steps(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, small: nn.Module, first: int) -> None:
    for step in range(first, first + _STEPS):
        generator = torch.Generator().manual_seed(step)
        for weight in small.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        try:
            optimizer.step()
        except Exception as error:  # a user's code may raise anything
            raise SpecError(
                f"optimizer.name: {spec.name} failed in step(): {type(error).__name__}: {error}; an optimizer that needs a "
                "closure is not supported"
            ) from error
