"""The spec of the learning-rate schedule, without torch; train/optim/schedule.py computes it."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.errors import SpecError
from maas_ray.spec import Spec
from maas_ray.train.spec.metrics import VALIDATION
from maas_ray.train.spec.names import check_name, is_import_path

_OPTIONS: dict[str, tuple[str, ...]] = {
    "constant": ("warmup_steps",),
    "cosine": ("warmup_steps", "min_lr_ratio"),
    "linear": ("warmup_steps", "min_lr_ratio"),
    "one_cycle": ("min_lr_ratio", "initial_lr_ratio", "rise_ratio"),
    "warmup_stable_decay": ("warmup_steps", "min_lr_ratio", "decay_ratio"),
    "plateau": ("warmup_steps", "min_lr_ratio", "metric", "mode", "factor", "patience", "min_delta"),
}
"""The built-in schedules and the fields that each uses."""
_OWN = ("warmup_steps", "params")
_ALWAYS_ALLOWED = ("min_lr_ratio",)
"""Fields without an effect on some schedules that earlier versions accepted for all of them."""


class ScheduleSpec(Spec):
    """The learning-rate schedule: a factor of `optimizer.lr` at each optimizer step."""

    name: str = "constant"
    """`constant`; `cosine` (half a period, without restarts; Loshchilov & Hutter 2017); `linear`; `one_cycle` (two half
    cosines: up to `optimizer.lr`, then down; Smith & Topin 2018); `warmup_stable_decay` (constant, then linear at the
    end; Hu et al. 2024, MiniCPM); `plateau` (lower whenever a validation metric no longer improves); or the import path
    `package.module:name` of a function (step, total_steps, **params) -> factor, both counted from the end of the
    warm-up."""
    params: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Further arguments of an imported function, or arguments of the constructor of an imported class whose objects are
    such functions."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the factor rises linearly to 1; the first step has `1 / (warmup_steps + 1)`."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """cosine, linear, one_cycle and warmup_stable_decay: the factor after the last step; plateau: the smallest factor."""
    initial_lr_ratio: float = Field(default=0.04, gt=0.0, le=1.0, exclude_if=lambda value: value == 0.04)
    """one_cycle: the factor of the first step."""
    rise_ratio: float = Field(default=0.3, ge=0.0, le=1.0, exclude_if=lambda value: value == 0.3)
    """one_cycle: share of the steps over which the factor rises to 1."""
    decay_ratio: float = Field(default=0.2, gt=0.0, le=1.0, exclude_if=lambda value: value == 0.2)
    """warmup_stable_decay: share of the steps, at the end, over which the factor falls."""
    metric: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """plateau: a metric of the validation split, such as `validation_accuracy`; None: `checkpoint.metric`."""
    mode: Literal["min", "max"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """plateau: whether a smaller or a larger metric is better; None: `checkpoint.mode`."""
    factor: float = Field(default=0.1, gt=0.0, lt=1.0, exclude_if=lambda value: value == 0.1)
    """plateau: factor by which the learning rate is lowered each time."""
    patience: PositiveInt = Field(default=5, exclude_if=lambda value: value == 5)
    """plateau: consecutive validations without an improvement after which the learning rate is lowered."""
    min_delta: float = Field(default=0.0, ge=0.0, exclude_if=lambda value: value == 0.0)
    """plateau: an improvement must be larger than this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_name("schedule", self.name, list(_OPTIONS))
        used = _OWN if is_import_path(self.name) else _OPTIONS[self.name]
        for option in {*_OWN, *(name for names in _OPTIONS.values() for name in names)} - {*used, *_ALWAYS_ALLOWED}:
            if getattr(self, option) != type(self).model_fields[option].get_default(call_default_factory=True):
                takers = [name for name, options in _OPTIONS.items() if option in options]
                raise ValueError(
                    f"{self.name} has no option {option}; remove it, or use {' or '.join(takers or ['an import path'])}"
                )
        return self


def refuse_steps(spec: ScheduleSpec, total_steps: int) -> None:
    """Raises `SpecError` without an optimizer step, or if the warm-up includes all of them."""
    if total_steps < 1:
        raise SpecError(f"a run needs at least one optimizer step, got {total_steps}")
    if spec.warmup_steps >= total_steps:
        raise SpecError(
            f"schedule.warmup_steps is {spec.warmup_steps}, but the run has {total_steps} optimizer step(s); "
            "lower warmup_steps, or train longer"
        )


def refuse_plateau(metric: str, has_validation: bool) -> None:
    """Raises `SpecError` for the schedule `plateau` without a metric of the validation split."""
    if not has_validation or not metric.startswith(VALIDATION):
        raise SpecError(
            f"schedule.metric: plateau needs a metric of the validation split, not {metric}; set data.split.validation and "
            "schedule.metric, or use another schedule"
        )
