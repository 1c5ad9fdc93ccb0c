"""The specs of loss, optimizer, schedule and moving average, without torch.

train/loop/loss.py, train/loop/optimizer.py and train/loop/ema.py build them.
"""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from maas_ray.data.spec.features import Task
from maas_ray.errors import SpecError
from maas_ray.spec import Spec
from maas_ray.train.spec.class_weights import ClassWeights, refuse_weights
from maas_ray.train.spec.threshold import ThresholdRule, refuse_threshold

LossName = Literal["cross_entropy", "bce", "mse", "mae", "huber"]
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
Implementation = Literal["auto", "fused", "foreach", "loop"]

LOSSES_BY_TASK: dict[Task, tuple[LossName, ...]] = {
    "classification": ("cross_entropy",),
    "binary": ("bce",),
    "regression": ("mse", "mae", "huber"),
    "language_modeling": ("cross_entropy",),
    "masked_language_modeling": ("cross_entropy",),
}
"""The valid losses of a task; the first is the default."""
_NEEDS = {
    "cross_entropy": "a class per row or token and a logit per class",
    "bce": "a target of 0 or 1 per row and a single logit",
    "mse": "a number per row",
    "mae": "a number per row",
    "huber": "a number per row",
}
OPTIONS: dict[OptimizerName, tuple[str, ...]] = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps"),
    "rmsprop": ("momentum", "alpha", "eps"),
}
"""The fields of an optimizer in addition to lr and weight_decay."""
FUSED: tuple[OptimizerName, ...] = ("sgd", "adam", "adamw")
"""Optimizers with a fused kernel for CPUs and GPUs."""


class ObjectiveSpec(Spec):
    """The loss and the penalties on weights."""

    loss: LossName | None = None
    """None: chosen by the task (classification and tokens: cross_entropy, binary: bce on logits, regression: mse)."""
    class_weights: ClassWeights | None = Field(default=None, exclude_if=lambda value: value is None)
    """Weights of classes in the training loss: `balanced` (rows / (classes * rows of the class), over the training
    split), or one weight per class name. A row's weight is that of its class times `data.weight`; the loss of a step is
    the sum of weighted losses over its global batch, divided by the sum of the weights. Metrics, `validation_loss`
    included, have no weights."""
    pos_weight: float | None = Field(default=None, gt=0.0, exclude_if=lambda value: value is None)
    """Binary: factor of the positive class's term of the training loss, which is still divided by the rows (or by the sum
    of `data.weight`), as in torch.nn.BCEWithLogitsLoss."""
    threshold: ThresholdRule | None = Field(default=None, exclude_if=lambda value: value is None)
    """Binary: the probability of the positive class from which on a row is of that class; None: 0.5. `f1` and `youden`
    (recall + specificity - 1) are maximized on the validation split, `precision>=0.9` has the highest recall with this
    precision there, `recall>=0.9` the highest precision; or a number. `evaluate`, `publish` and the exported graph use
    it; validation during training uses 0.5."""
    huber_delta: float = Field(default=1.0, gt=0.0)
    """Error above which `huber` grows linearly, in units of the target."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is distributed evenly over all classes (or token ids); not for regression."""
    l1: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of absolute weights."""
    l2: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of squared weights (without 1/2); part of the loss, unlike an optimizer's weight decay."""


def loss_name(spec: ObjectiveSpec, task: Task) -> LossName:
    """The loss of a task.

    Raises:
        SpecError: the loss, the label smoothing or a weight is invalid for the task.
    """
    refuse_threshold(spec.threshold, task)
    refuse_weights(spec.class_weights, spec.pos_weight, task)
    name = spec.loss or LOSSES_BY_TASK[task][0]
    if name not in LOSSES_BY_TASK[task]:
        raise SpecError(
            f"objective.loss: {name} needs {_NEEDS[name]}, but the task is {task}; use "
            f"{' or '.join(LOSSES_BY_TASK[task])}"
        )
    if spec.label_smoothing and task == "regression":
        raise SpecError(
            f"objective.label_smoothing: {spec.label_smoothing} needs classes, but the task is regression; set it to 0"
        )
    return name


class OptimizerSpec(Spec):
    """The optimizer; options of other optimizers are refused."""

    name: OptimizerName = "adamw"
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate; a schedule scales it."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Weight decay, without biases and normalizations. adamw: decoupled from the gradient (Loshchilov & Hutter 2019);
    the others add `weight_decay * w` to the gradient."""
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """sgd and rmsprop: momentum."""
    nesterov: bool = False
    """sgd with momentum: Nesterov momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adam and adamw: decay of the mean of gradients and of their squares, each in [0, 1)."""
    alpha: float = Field(default=0.99, ge=0.0, lt=1.0)
    """rmsprop: decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0.0)
    """adam, adamw and rmsprop: added to the denominator."""
    implementation: Implementation = "auto"
    """How torch computes the update: `fused` in one kernel for all weights, `foreach` in one kernel per operation for
    all weights, `loop` weight by weight. They differ in the last bits. `auto`: fused; for rmsprop, which has no fused
    kernel, foreach on a GPU and loop on a CPU."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in sorted({name for names in OPTIONS.values() for name in names} - set(OPTIONS[self.name])):
            if getattr(self, option) != type(self).model_fields[option].default:
                takers = [name for name, options in OPTIONS.items() if option in options]
                raise ValueError(f"{self.name} has no option {option}; remove it, or use {' or '.join(takers)}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, such as 0.9")
        if self.implementation == "fused" and self.name not in FUSED:
            raise ValueError(
                f"{self.name} has no fused implementation; use auto, foreach or loop, or {' or '.join(FUSED)}"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")
        return self


class ScheduleSpec(Spec):
    """The learning-rate schedule: a factor of `optimizer.lr` at each optimizer step."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up: constant, half a cosine (Loshchilov & Hutter 2017, without restarts) or linear."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the factor rises linearly to 1; the first step has `1 / (warmup_steps + 1)`."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """cosine and linear: the factor after the last step."""


class EmaSpec(Spec):
    """An exponential moving average of the weights, used in validation, `evaluate` and `publish`."""

    decay: float = Field(default=0.999, gt=0.0, lt=1.0)
    """After each step: `average = decay * average + (1 - decay) * weight`."""
    start_step: NonNegativeInt = 0
    """Number of steps before which the average equals the weights."""


def refuse_steps(spec: ScheduleSpec, total_steps: int) -> None:
    """Raises `SpecError` without an optimizer step, or if the warm-up includes all of them."""
    if total_steps < 1:
        raise SpecError(f"a run needs at least one optimizer step, got {total_steps}")
    if spec.warmup_steps >= total_steps:
        raise SpecError(
            f"schedule.warmup_steps is {spec.warmup_steps}, but the run has {total_steps} optimizer step(s); "
            "lower warmup_steps, or train longer"
        )
