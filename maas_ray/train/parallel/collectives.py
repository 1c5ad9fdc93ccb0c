"""One bit that rank 0 knows, on every rank. Collective; knows no Ray."""

import torch
import torch.distributed as dist


def rank0_says(answer: bool, device: torch.device) -> bool:
    """Rank 0's answer on every rank, whatever the others have.

    Args:
        answer: rank 0's counts.
        device: where this rank computes.
    """
    said = torch.tensor([answer], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.broadcast(said, src=0)
    return bool(said)
