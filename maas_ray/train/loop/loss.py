"""The loss functions of training, per sample. Independent of optimizers and data sources."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from maas_ray.data.spec.features import TOKEN_TASKS, Task
from maas_ray.errors import ModelError
from maas_ray.train.custom.loss import IGNORED, CustomLoss
from maas_ray.train.spec.optim import ObjectiveSpec, loss_name

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, target) -> loss of each sample [N]; for token tasks, summed over its counted tokens."""


def build_loss(spec: ObjectiveSpec, task: Task, *, is_training: bool = False) -> Loss:
    """Returns the loss function, without reduction: the caller divides by `num_valid` of the targets of all workers.

    Args:
        spec: the objective.
        task: task of the data.
        is_training: whether the loss includes `pos_weight`, which metrics do not.

    Returns:
        A function of logits [N, K] and a target [N] (int64 class codes, or float32) or [N, K] (probabilities) to losses
        [N]; for token tasks of
        logits [N, T, V] and a target int64 [N, T] (-100: not counted) to the sum over each row's tokens [N]. It raises
        ModelError if the shapes do not match. Losses are float32, or float64 if the logits are.

    Raises:
        SpecError: the loss or the label smoothing is invalid for the task, or an imported loss cannot be used.
    """
    name = loss_name(spec, task)
    if spec.is_imported:
        return CustomLoss(name, spec.params, per_token=task in TOKEN_TASKS)
    smoothing, delta = spec.label_smoothing, spec.huber_delta
    pos_weight = spec.pos_weight if is_training else None

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        is_mixed = target.is_floating_point() and target.shape == logits.shape  # probabilities of the classes
        if logits.dim() != 2 or not (is_mixed or target.shape == logits.shape[:1]):
            raise _unfit(name, logits, target, "[N, classes]")
        wide = _widened(logits)
        wanted = target.to(wide.dtype) if is_mixed else target
        losses = functional.cross_entropy(wide, wanted, reduction="none", label_smoothing=smoothing)
        return focused(losses) if name == "focal" else losses

    def focused(losses: Tensor) -> Tensor:
        # (1 - p)^gamma * -log p, with the probability p of the target (Lin et al. 2017, equation 4)
        return losses * (-torch.expm1(-losses)).clamp(min=1e-12) ** spec.focal_gamma

    def token_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 3 or target.shape != logits.shape[:2]:
            raise _unfit(name, logits, target, "[N, T, V]", "[N, T]")
        losses = functional.cross_entropy(
            _widened(logits).flatten(0, 1),
            target.flatten(),
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )
        return losses.view(target.shape).sum(dim=1)

    def single(logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape != (*target.shape, 1):
            raise _unfit(name, logits, target, "[N, 1]")  # [N, 1] against [N] would broadcast to [N, N] silently
        output = _widened(logits[:, 0])
        wanted = target.to(output.dtype)
        if name == "bce":
            wanted = wanted * (1 - smoothing) + smoothing / 2
        if name in ("bce", "focal"):
            factor = None if pos_weight is None else output.new_tensor(pos_weight)
            losses = functional.binary_cross_entropy_with_logits(output, wanted, reduction="none", pos_weight=factor)
            return focused(losses) if name == "focal" else losses
        if name == "mse":
            return functional.mse_loss(output, wanted, reduction="none")
        if name == "mae":
            return functional.l1_loss(output, wanted, reduction="none")
        return functional.huber_loss(output, wanted, reduction="none", delta=delta)

    if task in TOKEN_TASKS:
        return token_cross_entropy
    return cross_entropy if task == "classification" else single


def num_valid(target: Tensor) -> Tensor:
    """The divisor of the sum of losses over the global batch: the number of rows, or of counted tokens.

    Args:
        target: [N], or int64 [N, T] with -100 where a token does not count.

    Returns:
        A scalar int64 on the target's device.
    """
    if target.dim() < 2:
        return torch.tensor(len(target), dtype=torch.int64, device=target.device)
    return (target != IGNORED).sum()


def _widened(logits: Tensor) -> Tensor:
    """Converts logits to at least float32: half precision has too few digits for a sum of exponentials."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _unfit(name: str, logits: Tensor, target: Tensor, wanted: str, per: str = "[N]") -> ModelError:
    return ModelError(
        f"{name} needs logits {wanted} and a target {per}, but got {list(logits.shape)} and {list(target.shape)}"
    )
