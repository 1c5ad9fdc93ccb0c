"""Losses that a spec names by import path, as losses per row, and their check before the first step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maas_ray.errors import SpecError
from maas_ray.train.custom.imported import import_callable

FIELD = "objective.loss"
IGNORED = -100
"""Target value that does not count: torch's default of `ignore_index`."""
_SUMS = "the sum over rows is divided by the rows (or counted tokens) of the global batch"


class CustomLoss(nn.Module):
    """A user's loss as a loss of each row, weighted like a built-in one.

    The user's function receives float32 logits [N, K] and the target [N], [N] and [N] where a row has one output, and
    for token tasks the logits [M, V] and token ids [M] of the M counted tokens. It returns the loss of each row, [N] or
    [M]. It can then be summed over any split of the global batch: workers, shards and micro-batches.

    Args:
        path: import path of a class or a function.
        params: arguments of the constructor, or further arguments of the function.
        per_token: whether the task is per token.

    Raises:
        SpecError: it cannot be imported or constructed, or has parameters to train.
    """

    def __init__(self, path: str, params: Mapping[str, Any], *, per_token: bool) -> None:
        super().__init__()
        self.path, self._per_token = path, per_token
        self.function = import_callable(path, params, FIELD, 2)
        if isinstance(self.function, nn.Module) and any(True for _ in self.function.parameters()):
            raise SpecError(
                f"{FIELD}: {path} has parameters, which the optimizer does not train and checkpoints do not contain; "
                "make them a part of the model, or buffers if they are constant"
            )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [N, K] and target [N] -> losses [N]; [N, T, V] and [N, T] -> losses summed over tokens [N].

        Raises:
            SpecError: the user's function returns no loss for each row.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not self._per_token:
            if logits.shape == (*target.shape, 1):
                logits = logits[..., 0]  # [N, 1] against [N] would broadcast to [N, N]
                target = target.to(logits.dtype)
            return self._checked(logits, target)
        counted = target != IGNORED
        losses = torch.zeros(target.shape, dtype=logits.dtype, device=logits.device)
        if not bool(counted.any()):
            return losses.sum(dim=1) + logits.flatten(1).sum(dim=1) * 0.0
        return losses.masked_scatter(counted, self._checked(logits[counted], target[counted])).sum(dim=1)

    def _checked(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = self.function(logits, target)
        if not isinstance(losses, Tensor) or losses.shape != target.shape[:1]:
            got = f"a tensor {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise SpecError(
                f"{FIELD}: {self.path} returns {got} for logits {list(logits.shape)} and a target {list(target.shape)}; "
                f"return the loss of each row, {list(target.shape[:1])} (for torch's own losses: params: {{reduction: "
                f"none}}), since {_SUMS}"
            )
        return losses


def check_loss(loss: CustomLoss, logits: Tensor, target: Tensor) -> None:
    """Calls a user's loss on a few rows, and on each half of them.

    Args:
        loss: a `CustomLoss`.
        logits: any logits of these rows, as the model returns them.
        target: their target, at least two rows.

    Raises:
        SpecError: it raises, is not finite, has no gradient, changes its buffers, or the loss of a row depends on others.
    """
    path = loss.path
    buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}

    def call(rows: slice) -> tuple[Tensor, Tensor]:
        given = logits[rows].detach().clone().requires_grad_()
        try:
            losses: Tensor = loss(given, target[rows])
        except SpecError:
            raise
        except Exception as error:  # a user's code may raise anything
            raise SpecError(
                f"{FIELD}: {path} failed on logits {list(given.shape)} and a target {list(target[rows].shape)} of "
                f"{target.dtype}: {type(error).__name__}: {error}"
            ) from error
        return losses, given

    losses, given = call(slice(None))
    if not bool(losses.isfinite().all()):
        raise SpecError(f"{FIELD}: {path} returns {losses.tolist()} for the first rows of the data; it must be finite")
    if not losses.requires_grad:
        raise SpecError(
            f"{FIELD}: the result of {path} does not depend on the logits, so that nothing can be learned; check it for "
            "detach(), .data, numpy, argmax or torch.no_grad()"
        )
    losses.sum().backward()  # type: ignore[no-untyped-call]
    if given.grad is None or not bool(given.grad.isfinite().all()):
        raise SpecError(f"{FIELD}: the gradient of {path} is not finite on the first rows of the data")
    if any(not torch.equal(buffer, buffers[name]) for name, buffer in loss.named_buffers()):
        raise SpecError(
            f"{FIELD}: {path} changes its buffers, which checkpoints do not contain, so that a resumed run would differ; "
            "make the loss a function of logits and target alone"
        )
    half = len(target) // 2
    apart = torch.cat([call(slice(None, half))[0], call(slice(half, None))[0]])
    if not torch.allclose(losses, apart, rtol=1e-4, atol=1e-6):
        raise SpecError(
            f"{FIELD}: the losses of {path} depend on which rows are in the batch ({losses.tolist()} together, "
            f"{apart.tolist()} apart), but workers and micro-batches split the rows, and {_SUMS}; return the loss of "
            "each row by itself"
        )
