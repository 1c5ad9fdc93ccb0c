"""The specs of loss, optimizer and moving average, without torch.

train/loop/loss.py, train/optim/optimizer.py and train/optim/ema.py build them.
"""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from maas_ray.data.spec.features import Task
from maas_ray.errors import SpecError
from maas_ray.spec import Spec
from maas_ray.train.spec.class_weights import ClassWeights, refuse_weights
from maas_ray.train.spec.names import check_name, is_import_path
from maas_ray.train.spec.threshold import ThresholdRule, refuse_threshold

Implementation = Literal["auto", "fused", "foreach", "loop"]

LOSSES_BY_TASK: dict[Task, tuple[str, ...]] = {
    "classification": ("cross_entropy", "focal"),
    "binary": ("bce", "focal"),
    "regression": ("mse", "mae", "huber"),
    "language_modeling": ("cross_entropy",),
    "masked_language_modeling": ("cross_entropy",),
}
"""The built-in losses of a task; the first is the default."""
_NEEDS = {
    "cross_entropy": "a class per row or token and a logit per class",
    "focal": "a class per row",
    "bce": "a target of 0 or 1 per row and a single logit",
    "mse": "a number per row",
    "mae": "a number per row",
    "huber": "a number per row",
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps"),
    "rmsprop": ("momentum", "alpha", "eps"),
    "muon": ("muon_momentum", "betas", "eps"),
}
"""The fields of an optimizer in addition to lr and weight_decay."""
FUSED: tuple[str, ...] = ("sgd", "adam", "adamw", "muon")
"""Optimizers with a fused kernel for CPUs and GPUs; of muon, its adamw."""


class ObjectiveSpec(Spec):
    """The loss and the penalties on weights."""

    loss: str | None = None
    """`cross_entropy`, `focal` (Lin et al. 2017), `bce`, `mse`, `mae` or `huber`; None: chosen by the task
    (classification and tokens: cross_entropy, binary: bce on logits, regression: mse). Or the import path
    `package.module:name` of a class or function (logits, target, **params) -> one loss for each row. For tokens a row is
    one counted token."""
    params: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Arguments of the constructor of an imported class, or further arguments of an imported function."""
    focal_gamma: float = Field(default=2.0, ge=0.0, exclude_if=lambda value: value == 2.0)
    """`focal`: exponent that lowers the loss of rows that are classified well; 0 is the cross entropy."""
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
    """Error above which `huber` grows linearly, in the units of the loss: standard deviations of the target, unless
    `data.target_scaling` is none."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is distributed evenly over all classes (or token ids); not for regression."""
    l1: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of absolute weights."""
    l2: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of squared weights (without 1/2); part of the loss, unlike an optimizer's weight decay."""
    auxiliary: dict[str, float] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Weight of each auxiliary loss by name. A module with such losses returns `(logits, {name: losses [N]})` in training
    mode, and the logits alone in evaluation mode."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss is not None:
            check_name("loss", self.loss, list(_NEEDS))
        if self.params and not self.is_imported:
            raise ValueError(f"{self.loss or 'a built-in loss'} has no params; remove them")
        if self.focal_gamma != 2.0 and self.loss != "focal":
            raise ValueError(f"{self.loss or 'the default loss'} has no option focal_gamma; remove it, or use focal")
        if self.label_smoothing and (self.is_imported or self.loss == "focal"):
            raise ValueError(f"label_smoothing {self.label_smoothing} would have no effect on {self.loss}; set it to 0")
        return self

    @property
    def is_imported(self) -> bool:
        """Whether the loss is a user's own, named by import path."""
        return self.loss is not None and is_import_path(self.loss)


def loss_name(spec: ObjectiveSpec, task: Task) -> str:
    """The loss of a task: a built-in one, or an import path.

    Raises:
        SpecError: the loss, the label smoothing or a weight is invalid for the task.
    """
    refuse_threshold(spec.threshold, task)
    refuse_weights(spec.class_weights, spec.pos_weight, task)
    name = spec.loss or LOSSES_BY_TASK[task][0]
    if is_import_path(name):
        return name
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


class ParameterGroupSpec(Spec):
    """Weights with a learning rate or a weight decay of their own."""

    match: tuple[str, ...] = Field(min_length=1)
    """Patterns of their names, such as `encoder.*`; a weight belongs to the first group that matches it."""
    lr_factor: float = Field(default=1.0, gt=0.0)
    """Their learning rate as a multiple of `optimizer.lr`; the schedule scales both."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Their weight decay, also of biases and normalizations; None: as for all other weights."""


class OptimizerSpec(Spec):
    """The optimizer; options of other optimizers are refused."""

    name: str = "adamw"
    """`sgd`, `adam`, `adamw`, `rmsprop` or `muon` (Jordan et al. 2024: matrices between layers; adamw for embeddings, the
    last layer, biases and normalizations); or the import path `package.module:Class` of a torch.optim.Optimizer."""
    params: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Arguments of the constructor of an imported optimizer, except `params`, `lr` and `weight_decay`."""
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
    """adam, adamw and muon: decay of the mean of gradients and of their squares, each in [0, 1)."""
    muon_momentum: float = Field(default=0.95, ge=0.0, lt=1.0, exclude_if=lambda value: value == 0.95)
    """muon: Nesterov momentum of the matrices. Their update is scaled to the size of adamw's (Liu et al. 2025), so that
    one `lr` fits both; `betas` and `eps` are those of adamw."""
    alpha: float = Field(default=0.99, ge=0.0, lt=1.0)
    """rmsprop: decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0.0)
    """adam, adamw, muon and rmsprop: added to the denominator."""
    groups: tuple[ParameterGroupSpec, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Weights with a learning rate or a weight decay of their own."""
    freeze: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Patterns of the names of weights that keep their initial values, such as `encoder.*`. Dropout and the running
    statistics of batch normalizations in frozen layers are still those of training."""
    implementation: Implementation = "auto"
    """How torch computes the update: `fused` in one kernel for all weights, `foreach` in one kernel per operation for
    all weights, `loop` weight by weight. They differ in the last bits. `auto`: fused; for rmsprop, which has no fused
    kernel, foreach on a GPU and loop on a CPU."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_name("optimizer", self.name, list(OPTIONS))
        used = OPTIONS.get(self.name, ())
        for option in sorted({name for names in OPTIONS.values() for name in names} - set(used)):
            if getattr(self, option) != type(self).model_fields[option].default:
                takers = ["params"] if self.is_imported else [name for name in OPTIONS if option in OPTIONS[name]]
                raise ValueError(f"{self.name} has no option {option}; remove it, or use {' or '.join(takers)}")
        if self.params and not self.is_imported:
            raise ValueError(f"{self.name} has no params; remove them")
        if self.is_imported and self.implementation != "auto":
            raise ValueError(f"implementation would have no effect on {self.name}; remove it")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, such as 0.9")
        if self.implementation == "fused" and self.name not in FUSED:
            raise ValueError(
                f"{self.name} has no fused implementation; use auto, foreach or loop, or {' or '.join(FUSED)}"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")
        return self

    @property
    def is_imported(self) -> bool:
        """Whether the optimizer is a user's own, named by import path."""
        return is_import_path(self.name)


class EmaSpec(Spec):
    """An exponential moving average of the weights, used in validation, `evaluate` and `publish`."""

    decay: float = Field(default=0.999, gt=0.0, lt=1.0)
    """After each step: `average = decay * average + (1 - decay) * weight`."""
    start_step: NonNegativeInt = 0
    """Number of steps before which the average equals the weights."""
