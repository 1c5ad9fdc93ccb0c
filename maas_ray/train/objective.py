"""What training minimizes: a loss per sample and a penalty on weights. Knows no optimizer and no data source."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from maas_ray.data.features import TOKEN_TASKS, Task
from maas_ray.errors import ModelError, SpecError
from maas_ray.models.weights import weights
from maas_ray.spec import Spec

LossName = Literal["cross_entropy", "bce", "mse", "mae", "huber"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""(scores, target) -> loss of each sample [N], summed over its counted tokens where there is a target per token."""

IGNORED = -100
"""A target that does not count: torch's own default of `ignore_index`."""

LOSSES_BY_TASK: dict[Task, tuple[LossName, ...]] = {
    "classification": ("cross_entropy",),
    "binary": ("bce",),
    "regression": ("mse", "mae", "huber"),
    "language_modeling": ("cross_entropy",),
    "masked_language_modeling": ("cross_entropy",),
}
"""The losses that fit a task; the first is its default."""

_NEEDS = {
    "cross_entropy": "a class per row or token and a score per class",
    "bce": "a target of 0 or 1 per row and a single score",
    "mse": "a number per row",
    "mae": "a number per row",
    "huber": "a number per row",
}


class ObjectiveSpec(Spec):
    """The loss and the penalties on weights."""

    loss: LossName | None = None
    """None: by the task (classification and tokens: cross_entropy, binary: bce on logits, regression: mse)."""
    huber_delta: float = Field(default=1.0, gt=0.0)
    """Error above which `huber` grows linearly, in units of the target."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target spread evenly over all classes (or token codes); not for regression."""
    l1: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of absolute weights."""
    l2: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of squared weights (without a half); part of the loss, unlike an optimizer's weight decay."""


def build_loss(spec: ObjectiveSpec, task: Task) -> Loss:
    """The loss of each sample, not reduced: the caller divides by `num_valid` of the targets of all workers.

    Args:
        spec: the objective.
        task: what the target is.

    Returns:
        A function of scores [N, K] and a target [N] (int64 class codes, or float32) to losses [N]; for token tasks of
        scores [N, T, V] and a target int64 [N, T] (-100: not counted) to the sum over each row's tokens [N]. It raises
        ModelError if the shapes do not fit. Losses are float32, or float64 if the scores are.

    Raises:
        SpecError: the loss or the label smoothing does not fit the task.
    """
    name = spec.loss or LOSSES_BY_TASK[task][0]
    if name not in LOSSES_BY_TASK[task]:
        raise SpecError(
            f"objective.loss: {name} needs {_NEEDS[name]}, and the task is {task}; use {' or '.join(LOSSES_BY_TASK[task])}"
        )
    if spec.label_smoothing and task == "regression":
        raise SpecError(
            f"objective.label_smoothing: {spec.label_smoothing} spreads targets over classes, and the task is regression; "
            "set it to 0"
        )
    smoothing, delta = spec.label_smoothing, spec.huber_delta

    def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
        if scores.dim() != 2 or target.shape != scores.shape[:1]:
            raise _unfit(name, scores, target, "[N, classes]")
        return functional.cross_entropy(_widened(scores), target, reduction="none", label_smoothing=smoothing)

    def token_cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
        if scores.dim() != 3 or target.shape != scores.shape[:2]:
            raise _unfit(name, scores, target, "[N, T, V]", "[N, T]")
        losses = functional.cross_entropy(
            _widened(scores).flatten(0, 1),
            target.flatten(),
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )
        return losses.view(target.shape).sum(dim=1)

    def single(scores: Tensor, target: Tensor) -> Tensor:
        if scores.shape != (*target.shape, 1):
            raise _unfit(name, scores, target, "[N, 1]")  # [N, 1] against [N] would broadcast to [N, N] silently
        score = _widened(scores[:, 0])
        wanted = target.to(score.dtype)
        if name == "bce":
            wanted = wanted * (1 - smoothing) + smoothing / 2
            return functional.binary_cross_entropy_with_logits(score, wanted, reduction="none")
        if name == "mse":
            return functional.mse_loss(score, wanted, reduction="none")
        if name == "mae":
            return functional.l1_loss(score, wanted, reduction="none")
        return functional.huber_loss(score, wanted, reduction="none", delta=delta)

    if task in TOKEN_TASKS:
        return token_cross_entropy
    return cross_entropy if name == "cross_entropy" else single


def num_valid(target: Tensor) -> Tensor:
    """What the sum of losses over the global batch is divided by: the number of rows, or of counted tokens.

    Args:
        target: [N], or int64 [N, T] with -100 where a token does not count.

    Returns:
        A scalar int64 on the target's device.
    """
    if target.dim() < 2:
        return torch.tensor(len(target), dtype=torch.int64, device=target.device)
    return (target != IGNORED).sum()


def penalty(spec: ObjectiveSpec, model: nn.Module) -> Tensor:
    """`l1 * sum |w| + l2 * sum w^2` over the trained weights, as a scalar; add it once per optimizer step.

    Biases and the gains of normalizations are left out; see `maas_ray.models.weights.weights`.
    """
    total = torch.zeros((), device=next((parameter.device for parameter in model.parameters()), None))
    if not spec.l1 and not spec.l2:
        return total
    for weight in weights(model):
        if weight.requires_grad and spec.l1:
            total = total + spec.l1 * weight.abs().sum()
        if weight.requires_grad and spec.l2:
            total = total + spec.l2 * weight.square().sum()
    return total


def _widened(scores: Tensor) -> Tensor:
    """At least float32: half precision has too few digits for a sum of exponentials."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _unfit(name: str, scores: Tensor, target: Tensor, wanted: str, per: str = "[N]") -> ModelError:
    return ModelError(
        f"{name} takes scores {wanted} and a target {per}; it got {list(scores.shape)} and {list(target.shape)}"
    )
