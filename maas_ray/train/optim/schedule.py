"""The learning rate of each step. Independent of the loss and the loop.

The factor is a closed form of the step, so that the rate of any step is known without those before it. The scale of a
plateau is a function of the validations so far, which every checkpoint contains; see spec/plateau.py.
"""

from collections.abc import Callable
from math import cos, isfinite, pi

import torch

from maas_ray.errors import SpecError
from maas_ray.train.custom.imported import import_callable
from maas_ray.train.spec.names import is_import_path
from maas_ray.train.spec.schedule import ScheduleSpec, refuse_steps

Factor = Callable[[int], float]
"""Completed steps -> factor of the peak learning rates of all groups."""
_CHECKED = 256
"""Number of steps at which a user's schedule is checked."""


class Schedule:
    """Sets the learning rates of an optimizer.

    Args:
        optimizer: its current learning rates are the peaks.
        factor: factor of the peaks at each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Factor) -> None:
        self._optimizer = optimizer
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._peak = float(optimizer.defaults.get("lr", self._peaks[0]))
        self._factor = factor
        self._scale = 1.0
        self._step = 0
        self.set_step(0)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, without the factors of parameter groups."""
        return self._peak * self._factor(self._step) * self._scale

    def step(self) -> None:
        """After each optimizer step: sets the rates of the next one."""
        self.set_step(self._step + 1)

    def set_step(self, step: int) -> None:
        """Sets the learning rates after `step` steps."""
        self._step = step
        factor = self._factor(step)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor * self._scale

    def set_scale(self, scale: float) -> None:
        """Sets a further factor of all rates, from the next step on."""
        self._scale = scale
        self.set_step(self._step)


def build_schedule(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, total_steps: int) -> Schedule:
    """Builds the schedule, which must be stepped once after each optimizer step.

    Args:
        spec: the schedule.
        optimizer: the optimizer whose learning rates are scaled.
        total_steps: optimizer steps of the whole run.

    Raises:
        SpecError: the run has no step, the warm-up includes all of them, or an imported schedule cannot be used.
    """
    return Schedule(optimizer, build_factor(spec, total_steps))


def build_factor(spec: ScheduleSpec, total_steps: int) -> Factor:
    """The factor of the learning rate at each step; for the arguments see `build_schedule`."""
    refuse_steps(spec, total_steps)
    if not is_import_path(spec.name):
        return lambda step: learning_rate_factor(spec, step, total_steps)
    own, rest = import_callable(spec.name, spec.params, "schedule.name", 2), total_steps - spec.warmup_steps

    def factor(step: int) -> float:
        if step < spec.warmup_steps:
            return _warm(spec, step)
        return float(own(min(step - spec.warmup_steps, rest), rest))

    return factor


def check_schedule(spec: ScheduleSpec, total_steps: int) -> None:
    """Calls a user's schedule at steps of the whole run, forwards and backwards.

    Raises:
        SpecError: it raises, is negative or not finite, or depends on earlier calls, which a resumed run has not made.
    """
    factor = build_factor(spec, total_steps)
    steps = sorted({number * total_steps // _CHECKED for number in range(_CHECKED)})
    found: dict[int, float] = {}
    for step in [*steps, *reversed(steps)]:
        try:
            value = factor(step)
        except Exception as error:  # a user's code may raise anything
            raise SpecError(
                f"schedule.name: {spec.name} failed at step {step} of {total_steps}: {type(error).__name__}: {error}"
            ) from error
        if not isfinite(value) or value < 0:
            raise SpecError(
                f"schedule.name: {spec.name} returns {value} at step {step} of {total_steps}; return a factor of "
                "optimizer.lr that is finite and at least 0"
            )
        if found.setdefault(step, value) != value:
            raise SpecError(
                f"schedule.name: {spec.name} returns {found[step]} and later {value} for step {step}; a resumed run starts "
                "at any step, so compute the factor from (step, total_steps) alone"
            )


def learning_rate_factor(spec: ScheduleSpec, step: int, total_steps: int) -> float:
    """The factor in [0, 1] of the peak learning rate at a step, from 0, of a built-in schedule."""
    if step < spec.warmup_steps:
        return _warm(spec, step)
    if spec.name in ("constant", "plateau"):
        return 1.0
    rest = total_steps - spec.warmup_steps
    done = min(1.0, (step - spec.warmup_steps) / rest)
    lowest = spec.min_lr_ratio
    if spec.name == "cosine":
        return lowest + (1 - lowest) * _half_cosine(done)
    if spec.name == "linear":
        return lowest + (1 - lowest) * (1 - done)
    if spec.name == "one_cycle":
        if done < spec.rise_ratio:
            return 1 - (1 - spec.initial_lr_ratio) * _half_cosine(done / spec.rise_ratio)
        return lowest + (1 - lowest) * _half_cosine((done - spec.rise_ratio) / max(1 - spec.rise_ratio, 1e-12))
    falling = max(0.0, (done - (1 - spec.decay_ratio)) / spec.decay_ratio)  # warmup_stable_decay
    return 1 - (1 - lowest) * falling


def _warm(spec: ScheduleSpec, step: int) -> float:
    return (step + 1) / (spec.warmup_steps + 1)


def _half_cosine(share: float) -> float:
    """Falls from 1 to 0 while `share` rises from 0 to 1."""
    return (1 + cos(pi * share)) / 2
