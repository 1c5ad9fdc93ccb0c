"""Muon: momentum of matrices, orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

torch.optim.Muon computes the same on whole matrices. Here each rank of a sharded or tensor-parallel model gathers the
update of a matrix, orthogonalizes it whole and applies its own part, so that every layout trains the same.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steep at zero, so that five steps bring all singular values near one."""
_STEPS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Updates matrices by orthogonalized Nesterov momentum, scaled to the size of AdamW's updates (Liu et al. 2025).

    Args:
        params: groups of parameters of two dimensions.
        lr: learning rate, about that of AdamW.
        momentum: decay of the mean of gradients.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is not supported
        """One step. Collective over the ranks that share a matrix."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(mean, group["momentum"])
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        change = orthogonalized(whole) * (-0.2 * group["lr"] * max(whole.shape) ** 0.5)
        if isinstance(weight, DTensor):  # every rank has the whole change: no message is needed
            change = distribute_tensor(change, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(change)


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` [M, N] and singular values near one, by Newton-Schulz iterations.

    In bfloat16 on a GPU, whose products are fast, else in the type of the matrix.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.T if is_tall else x
    return found.to(matrix.dtype)
