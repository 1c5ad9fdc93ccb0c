"""Broadcasts one bit of rank 0 to every rank. Independent of Ray."""

import torch
import torch.distributed as dist


def rank0_says(answer: bool, device: torch.device) -> bool:
    """Returns the answer of rank 0 on every rank. Collective.

    Args:
        answer: the answer; ignored on other ranks than 0.
        device: device of this rank.
    """
    said = torch.tensor([answer], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.broadcast(said, src=0)
    return bool(said)
