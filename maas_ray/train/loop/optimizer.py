"""Builds optimizers and learning-rate schedules by name. Independent of the loss and the loop."""

from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from maas_ray.errors import ModelError
from maas_ray.models.weights import weights
from maas_ray.train.spec.optim import FUSED, OPTIONS, OptimizerName, OptimizerSpec, ScheduleSpec, refuse_steps

_KINDS: dict[OptimizerName, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Builds an optimizer of the trained parameters, with separate groups for decayed weights and other parameters.

    Raises:
        ModelError: the model has no parameter to train.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(f"{type(model).__name__} has no parameter to train")
    decayed = {id(weight) for weight in weights(model)}
    groups: dict[Any, dict[str, Any]] = {}
    for is_decayed in (True, False):
        for parameter in trained:
            if (id(parameter) in decayed) == is_decayed:
                # One kernel updates all weights of a group, so that its DTensors must have the same mesh.
                key = (is_decayed, parameter.device_mesh if isinstance(parameter, DTensor) else None)
                decay = spec.weight_decay if is_decayed else 0.0
                groups.setdefault(key, {"params": [], "weight_decay": decay})["params"].append(parameter)
    options: dict[str, Any] = {name: getattr(spec, name) for name in OPTIONS[spec.name]} | _kernels(spec)
    kind: Any = _KINDS[spec.name]
    optimizer: torch.optim.Optimizer = kind(list(groups.values()), lr=spec.lr, **options)
    return optimizer


def _kernels(spec: OptimizerSpec) -> dict[str, bool]:
    if spec.implementation == "auto":
        return {"fused": True} if spec.name in FUSED else {}
    if spec.implementation == "loop":
        return {"foreach": False}
    return {spec.implementation: True}


def build_schedule(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """Builds the schedule, which must be stepped once after each optimizer step.

    The factor is a closed form of the step, so that a schedule restored from its state continues exactly.

    Args:
        spec: the schedule.
        optimizer: the optimizer whose learning rates are scaled.
        total_steps: optimizer steps of the whole run.

    Raises:
        SpecError: the run has no step, or the warm-up includes all of them.
    """
    refuse_steps(spec, total_steps)

    def factor(step: int) -> float:
        return learning_rate_factor(spec, step, total_steps)

    return LambdaLR(optimizer, factor)


def learning_rate_factor(spec: ScheduleSpec, step: int, total_steps: int) -> float:
    """The factor in (0, 1] of the peak learning rate at a step, from 0; at `total_steps` it is `min_lr_ratio`."""
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.name == "constant":
        return 1.0
    done = min(1.0, (step - spec.warmup_steps) / (total_steps - spec.warmup_steps))
    course = (1 + cos(pi * done)) / 2 if spec.name == "cosine" else 1 - done
    return spec.min_lr_ratio + (1 - spec.min_lr_ratio) * course
