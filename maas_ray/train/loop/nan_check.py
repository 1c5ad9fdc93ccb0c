"""Whether a state may be committed: one with a NaN or an infinite number never may. Knows no store and no loop."""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from maas_ray.errors import TrainingFailed
from maas_ray.train.loop.gradients import local


def refuse_not_finite(
    tensors: Mapping[str, Tensor], step: int, device: torch.device, buffers: Collection[str] = ()
) -> None:
    """Ends the run if the state is not finite: it would be restored again and again. Collective over all ranks.

    One pass over this rank's pieces, and one number to agree upon.

    Args:
        tensors: what is to be committed, by name; of a DTensor this rank's piece is looked at.
        step: steps done, for the message.
        device: where this rank computes.
        buffers: names of tensors that may be infinite, as masks are on purpose; never NaN.

    Raises:
        TrainingFailed: on every rank; a rank that holds such a tensor names it.
    """
    pieces = {name: local(value.detach()) for name, value in tensors.items() if value.is_floating_point()}
    # A sum is NaN or infinite if one of its terms is. Where it is for another reason, the exact look finds nothing.
    sums = [piece.sum().to(device, torch.float32) for piece in pieces.values() if piece.numel()]
    culprit = None
    if sums and not bool(torch.stack(sums).isfinite().all()):
        culprit = next((name for name, piece in pieces.items() if _is_bad(piece, name in buffers)), None)
    found = torch.tensor([culprit is not None], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if int(found):
        raise TrainingFailed(
            f"after step {step} {culprit or 'a tensor of another rank'} holds a NaN or infinite number: this state is not "
            "committed, the checkpoints before it are kept; lower optimizer.lr, set max_grad_norm, or check the data for extremes"
        )


def _is_bad(piece: Tensor, may_be_infinite: bool) -> bool:
    return bool(piece.isnan().any()) if may_be_infinite else not bool(piece.isfinite().all())
