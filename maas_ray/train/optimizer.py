"""Optimizers and learning-rate schedules by name. Knows no loss and no loop."""

from math import cos, pi
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.weights import weights
from maas_ray.spec import Spec

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
Implementation = Literal["auto", "fused", "foreach", "loop"]

_KINDS: dict[OptimizerName, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
_OPTIONS: dict[OptimizerName, tuple[str, ...]] = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps"),
    "rmsprop": ("momentum", "alpha", "eps"),
}
"""The fields beside lr and weight_decay that an optimizer takes."""
_FUSED: tuple[OptimizerName, ...] = ("sgd", "adam", "adamw")
"""Those with a fused kernel for CPUs and GPUs."""


class OptimizerSpec(Spec):
    """The optimizer; an option that the named one does not take is refused."""

    name: OptimizerName = "adamw"
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate; a schedule scales it."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of weights, not of biases and normalizations. adamw: decoupled from the gradient (Loshchilov & Hutter
    2019); the others add `weight_decay * w` to the gradient."""
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """sgd and rmsprop."""
    nesterov: bool = False
    """sgd with a momentum: look ahead along it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adam and adamw: decay of the mean of gradients and of their squares, each in [0, 1)."""
    alpha: float = Field(default=0.99, ge=0.0, lt=1.0)
    """rmsprop: decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0.0)
    """adam, adamw and rmsprop: added to the denominator."""
    implementation: Implementation = "auto"
    """How torch computes the update: `fused` in one kernel for all weights, `foreach` in one operation each for all of
    them, `loop` weight by weight. They differ in the last bits. `auto`: fused, and for rmsprop, which has no such kernel,
    foreach with a GPU and loop without."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in sorted({name for names in _OPTIONS.values() for name in names} - set(_OPTIONS[self.name])):
            if getattr(self, option) != type(self).model_fields[option].default:
                takers = [name for name, options in _OPTIONS.items() if option in options]
                raise ValueError(f"{self.name} takes no {option}; remove it, or use {' or '.join(takers)}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, such as 0.9")
        if self.implementation == "fused" and self.name not in _FUSED:
            raise ValueError(
                f"{self.name} has no fused implementation; use auto, foreach or loop, or {' or '.join(_FUSED)}"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas have to be in [0, 1), got {list(self.betas)}")
        return self


class ScheduleSpec(Spec):
    """The factor of the learning rate at each optimizer step."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up: constant, half a cosine (Loshchilov & Hutter 2017, without restarts) or a line."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the factor climbs linearly to 1; the first step has `1 / (warmup_steps + 1)`."""
    min_factor: float = Field(default=0.0, ge=0.0, le=1.0)
    """cosine and linear: the factor after the last step."""


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters: weights in groups of their own, the undecayed rest in others.

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
                # One kernel takes all weights of a group: those of which ranks have pieces are of one mesh.
                key = (is_decayed, parameter.device_mesh if isinstance(parameter, DTensor) else None)
                decay = spec.weight_decay if is_decayed else 0.0
                groups.setdefault(key, {"params": [], "weight_decay": decay})["params"].append(parameter)
    options: dict[str, Any] = {name: getattr(spec, name) for name in _OPTIONS[spec.name]} | _kernels(spec)
    kind: Any = _KINDS[spec.name]
    optimizer: torch.optim.Optimizer = kind(list(groups.values()), lr=spec.lr, **options)
    return optimizer


def _kernels(spec: OptimizerSpec) -> dict[str, bool]:
    if spec.implementation == "auto":
        return {"fused": True} if spec.name in _FUSED else {}
    if spec.implementation == "loop":
        return {"foreach": False}
    return {spec.implementation: True}


def build_schedule(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The schedule, to be stepped once after each optimizer step.

    The factor is a closed form of the step, so that a schedule restored from its state continues exactly.

    Args:
        spec: the schedule.
        optimizer: the optimizer whose learning rates are scaled.
        total_steps: optimizer steps of the whole run.

    Raises:
        SpecError: there is no step, or the warm-up takes all of them.
    """
    if total_steps < 1:
        raise SpecError(f"a run needs at least one optimizer step, got {total_steps}")
    if spec.warmup_steps >= total_steps:
        raise SpecError(
            f"schedule.warmup_steps is {spec.warmup_steps} and the run has {total_steps} optimizer step(s); "
            "warm up for fewer, or train longer"
        )

    def factor(step: int) -> float:
        return learning_rate_factor(spec, step, total_steps)

    return LambdaLR(optimizer, factor)


def learning_rate_factor(spec: ScheduleSpec, step: int, total_steps: int) -> float:
    """The factor in (0, 1] of the peak learning rate at a step counted from 0; at `total_steps` it is `min_factor`."""
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.name == "constant":
        return 1.0
    done = min(1.0, (step - spec.warmup_steps) / (total_steps - spec.warmup_steps))
    course = (1 + cos(pi * done)) / 2 if spec.name == "cosine" else 1 - done
    return spec.min_factor + (1 - spec.min_factor) * course
