"""Refuses to commit a state with NaN or infinite numbers. Independent of stores and of the loop."""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from maas_ray.errors import TrainingFailed
from maas_ray.train.modules.sharded import local


def refuse_not_finite(
    tensors: Mapping[str, Tensor], step: int, device: torch.device, buffers: Collection[str] = ()
) -> None:
    """Ends the run if the state is not finite, since it would be restored repeatedly. Collective over all ranks.

    One pass over this rank's parts, and one collective operation of one number.

    Args:
        tensors: the state to commit, by name; of a DTensor, the part of this rank is checked.
        step: number of completed steps, for the message.
        device: device of this rank.
        buffers: names of tensors that may be infinite, such as masks, but not NaN.

    Raises:
        TrainingFailed: on every rank; on ranks with such a tensor the message contains its name.
    """
    pieces = {name: local(value.detach()) for name, value in tensors.items() if value.is_floating_point()}
    # A sum is NaN or infinite if one of its terms is. If it is for another reason, the exact check finds nothing.
    sums = [piece.sum().to(device, torch.float32) for piece in pieces.values() if piece.numel()]
    culprit = None
    if sums and not bool(torch.stack(sums).isfinite().all()):
        culprit = next((name for name, piece in pieces.items() if _is_bad(piece, name in buffers)), None)
    found = torch.tensor([culprit is not None], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if int(found):
        raise TrainingFailed(
            f"after step {step} {culprit or 'a tensor of another rank'} contains a NaN or infinite number; this state "
            "is not committed, and earlier checkpoints are kept; lower optimizer.lr, set max_grad_norm, or check the "
            "data for outliers"
        )


def _is_bad(piece: Tensor, may_be_infinite: bool) -> bool:
    return bool(piece.isnan().any()) if may_be_infinite else not bool(piece.isfinite().all())
