"""Copies bits between tensors from any thread, and allocates buffers for it. Independent of checkpoints."""

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_PAGE_BYTES = 4096
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def new_buffer(size: int, *, is_pinned: bool = False) -> Tensor:
    """Page-aligned memory of `size` bytes (uint8), as writes that bypass the page cache need it.

    Args:
        size: bytes, at least 1.
        is_pinned: for copies from a GPU (not tested on one). Otherwise it uses huge pages if the system has them: new
            memory then needs 512 times fewer page faults.
    """
    if is_pinned:
        memory = torch.empty(size + _PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        return memory[-memory.data_ptr() % _PAGE_BYTES :][:size]
    pages = mmap.mmap(-1, size)  # released with the last tensor that views it
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def copy_values(target: Tensor, source: Tensor) -> None:
    """Copies a tensor into one of the same shape and type; asynchronously from or to an accelerator."""
    with torch.no_grad():
        target.copy_(source, non_blocking=True)


def copy_bits(target: Tensor, source: Tensor) -> None:
    """As `copy_values`, for a thread other than the main thread.

    Between CPU tensors NumPy copies, which starts no threads: torch would start a thread pool in each calling thread,
    in addition to that of training.
    """
    if target.device.type == source.device.type == "cpu":
        bits = _SAME_SIZE[target.element_size()]
        np.copyto(target.detach().view(bits).numpy(), source.detach().view(bits).numpy())
    else:
        copy_values(target, source)


def copy_box(target: Tensor, data: memoryview, sizes: Sequence[int], box: Sequence[slice]) -> None:
    """Fills a tensor with a box of a rectangle of `sizes`, whose values are contiguous in `data`."""
    if target.device.type == "cpu":
        bits = _SAME_SIZE[target.element_size()]
        into = target.detach().view(bits).numpy()
        np.copyto(into, np.frombuffer(data, into.dtype).reshape(sizes)[tuple(box)])
    else:  # torch does not accept read-only memory
        copy_values(target, torch.frombuffer(bytearray(data), dtype=target.dtype).view(*sizes)[tuple(box)])


def wait_for_copies(tensors: Iterable[Tensor]) -> None:
    """Waits for the copies from and to accelerators (not tested on one); does nothing on a CPU."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def beside_computing(devices: Iterable[torch.device]) -> Iterator[None]:
    """Within the block, copies from accelerators run concurrently with computation; they are complete when it ends.

    They use a separate stream (not tested on a GPU): in the default stream they would wait for the kernels of other
    threads, and those for them. For the calling thread only; does nothing on a CPU.
    """
    with contextlib.ExitStack() as entered:
        streams = [torch.Stream(device) for device in {*devices} if device.type != "cpu"]
        for stream in streams:
            entered.enter_context(stream)
        yield
        for stream in streams:
            stream.synchronize()
