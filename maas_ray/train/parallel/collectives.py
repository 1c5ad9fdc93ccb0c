"""Broadcasts one bit of rank 0 to every rank. Independent of Ray."""

import torch
import torch.distributed as dist


def decided_by_rank0(decision: bool, device: torch.device) -> bool:
    """Returns the decision of rank 0 on every rank. Collective.

    Args:
        decision: the decision; ignored on other ranks than 0.
        device: device of this rank.
    """
    shared = torch.tensor([decision], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.broadcast(shared, src=0)
    return bool(shared)
