"""What training minimizes: a loss per sample and a penalty on weights. Knows no optimizer and no data source."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.weights import weights
from maas_ray.spec import Spec

Task = Literal["classification", "binary", "regression"]
LossName = Literal["cross_entropy", "bce", "mse", "mae", "huber"]
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES_BY_TASK: dict[Task, tuple[LossName, ...]] = {
    "classification": ("cross_entropy",),
    "binary": ("bce",),
    "regression": ("mse", "mae", "huber"),
}
"""The losses that fit a task; the first is its default."""

_NEEDS = {
    "cross_entropy": "a class per row and a score per class",
    "bce": "a target of 0 or 1 per row and a single score",
    "mse": "a number per row",
    "mae": "a number per row",
    "huber": "a number per row",
}


class ObjectiveSpec(Spec):
    """The loss and the penalties on weights."""

    loss: LossName | None = None
    """None: by the task (classification: cross_entropy, binary: bce on logits, regression: mse)."""
    huber_delta: float = Field(default=1.0, gt=0.0)
    """Error above which `huber` grows linearly, in units of the target."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target spread evenly over all classes; classification and binary only."""
    l1: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of absolute weights."""
    l2: float = Field(default=0.0, ge=0.0)
    """Factor of the sum of squared weights (without a half); part of the loss, unlike an optimizer's weight decay."""


def build_loss(spec: ObjectiveSpec, task: Task) -> Loss:
    """The loss of each sample, not reduced, so that the caller can divide by the number of samples of all workers.

    Args:
        spec: the objective.
        task: what the target is.

    Returns:
        A function of scores [N, K] and a target [N] (int64 class codes, or float32) to float32 losses [N]; it raises
        ModelError if the shapes do not fit. Scores in lower precision are widened first.

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
        return functional.cross_entropy(scores.float(), target, reduction="none", label_smoothing=smoothing)

    def single(scores: Tensor, target: Tensor) -> Tensor:
        if scores.shape != (*target.shape, 1):
            raise _unfit(name, scores, target, "[N, 1]")  # [N, 1] against [N] would broadcast to [N, N] silently
        score, wanted = scores[:, 0].float(), target.float()
        if name == "bce":
            wanted = wanted * (1 - smoothing) + smoothing / 2
            return functional.binary_cross_entropy_with_logits(score, wanted, reduction="none")
        if name == "mse":
            return functional.mse_loss(score, wanted, reduction="none")
        if name == "mae":
            return functional.l1_loss(score, wanted, reduction="none")
        return functional.huber_loss(score, wanted, reduction="none", delta=delta)

    return cross_entropy if name == "cross_entropy" else single


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


def _unfit(name: str, scores: Tensor, target: Tensor, wanted: str) -> ModelError:
    return ModelError(
        f"{name} takes scores {wanted} and a target [N]; it got {list(scores.shape)} and {list(target.shape)}"
    )
