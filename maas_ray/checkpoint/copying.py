"""Copies bits between tensors from any thread. Knows no checkpoint."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_values(target: Tensor, source: Tensor) -> None:
    """Copies a tensor into one of the same shape and type; from or to an accelerator without waiting for the end."""
    with torch.no_grad():
        target.copy_(source, non_blocking=True)


def copy_bits(target: Tensor, source: Tensor) -> None:
    """As `copy_values`, from a thread beside the main one.

    Between CPU tensors the copy is NumPy's, which takes no more threads: torch's own would start a pool of threads in
    each thread that calls it, beside the one that training computes with.
    """
    if target.device.type == source.device.type == "cpu":
        bits = _SAME_SIZE[target.element_size()]
        np.copyto(target.detach().view(bits).numpy(), source.detach().view(bits).numpy())
    else:
        copy_values(target, source)


def wait_for_copies(tensors: Iterable[Tensor]) -> None:
    """Waits for the copies from and to accelerators (not run on one); nothing to do on a CPU."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
