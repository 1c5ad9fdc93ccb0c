"""Operations on gradients between the backward pass and the optimizer, on any layout. Independent of the loss.

A parameter is whole on each rank, or a DTensor of which each rank has a part. All computations use the local parts;
sums over all parameters count each element once, with one collective operation of one number.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maas_ray.train.modules.sharded import local
from maas_ray.train.spec.parallelism import MeshLayout


def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives each gradient the placement of its parameter: autograd can leave a pending sum.

    FSDP2 does this itself; tensor parallelism alone does not. Collective over its ranks.
    """
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def add_penalty_gradient(weights: Iterable[nn.Parameter], l1: float, l2: float) -> None:
    """Adds the gradient of `l1 * sum |w| + l2 * sum w^2` (Tibshirani 1996; Hoerl & Kennard 1970)."""
    with torch.no_grad():
        for weight in weights:
            if weight.grad is None:
                continue
            value, grad = local(weight), local(weight.grad)
            if l1:
                grad.add_(value.sign(), alpha=l1)
            if l2:
                grad.add_(value, alpha=2 * l2)


def penalty(weights: Iterable[nn.Parameter], l1: float, l2: float, layout: MeshLayout) -> float:
    """`l1 * sum |w| + l2 * sum w^2` over the weights of the whole model. Collective over all ranks."""
    total = 0.0
    if l1:
        total += l1 * _sum_once(weights, lambda value: value.double().abs().sum(), layout)
    if l2:
        total += l2 * _sum_once(weights, lambda value: value.double().square().sum(), layout)
    return total


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, layout: MeshLayout) -> float:
    """Scales all gradients so that their norm over the whole model is at most `max_norm`. Collective over all ranks.

    Returns:
        The norm before clipping (Pascanu et al. 2013), the same on every rank.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(grads, layout)
    if norm > max_norm:
        for grad in grads:
            local(grad).mul_(max_norm / norm)
    return norm


def gradient_norm(grads: Iterable[Tensor], layout: MeshLayout) -> float:
    """The 2-norm of the gradient of the whole model. Collective over all ranks."""
    return math.sqrt(_sum_once(grads, _sum_of_squares, layout))


def _sum_of_squares(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return torch.dot(flat, flat).double()  # sufficiently exact, in a fiftieth of the time of float64


def _sum_once(values: Iterable[Tensor], of_piece: Callable[[Tensor], Tensor], layout: MeshLayout) -> float:
    """The sum over all elements of the whole model, in float64; elements on several ranks count once."""
    terms = []
    values = list(values)
    if layout.pp == 1 and not any(isinstance(value, DTensor) for value in values):
        # Replicas: each rank has all elements.
        return float(torch.stack([of_piece(value.detach()) for value in values]).sum()) if values else 0.0
    for value in values:
        pieces = 1
        if isinstance(value, DTensor):
            for size, placement in zip(value.device_mesh.shape, value.placements, strict=True):
                pieces *= 1 if placement.is_replicate() else size
        # All ranks of the stage have the value or a part of it: this number of ranks has the same part.
        same = layout.world // layout.pp // pieces
        terms.append(of_piece(local(value).detach()) / same)
    device = torch.device("cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu")
    total = torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)
