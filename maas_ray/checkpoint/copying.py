"""Copies bits between tensors from any thread, and the buffers for it. Knows no checkpoint."""

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_PAGE_BYTES = 4096
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def new_buffer(size: int, *, is_pinned: bool = False) -> Tensor:
    """Memory for `size` bytes (uint8) that begins with a page, as writes past the page cache need it.

    Args:
        size: bytes, at least 1.
        is_pinned: for copies from a GPU (not run on one). Else it lies in huge pages where the system has them: new
            memory is then there after 512 times fewer faults.
    """
    if is_pinned:
        memory = torch.empty(size + _PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        return memory[-memory.data_ptr() % _PAGE_BYTES :][:size]
    pages = mmap.mmap(-1, size)  # given back with the last tensor that looks into it
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


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


def copy_box(target: Tensor, data: memoryview, sizes: Sequence[int], box: Sequence[slice]) -> None:
    """Fills a tensor with a box of a rectangle of `sizes`, whose values lie in `data` one after the other."""
    if target.device.type == "cpu":
        bits = _SAME_SIZE[target.element_size()]
        into = target.detach().view(bits).numpy()
        np.copyto(into, np.frombuffer(data, into.dtype).reshape(sizes)[tuple(box)])
    else:  # torch takes no memory that cannot be written to
        copy_values(target, torch.frombuffer(bytearray(data), dtype=target.dtype).view(*sizes)[tuple(box)])


def wait_for_copies(tensors: Iterable[Tensor]) -> None:
    """Waits for the copies from and to accelerators (not run on one); nothing to do on a CPU."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def beside_computing(devices: Iterable[torch.device]) -> Iterator[None]:
    """Within the block copies from accelerators go beside what these compute, and are done when it ends.

    In a stream of their own (not run on a GPU): in the default one they would wait for kernels that other threads have
    given, and those for them. For the thread's own use; nothing to do on a CPU.
    """
    with contextlib.ExitStack() as entered:
        streams = [torch.Stream(device) for device in {*devices} if device.type != "cpu"]
        for stream in streams:
            entered.enter_context(stream)
        yield
        for stream in streams:
            stream.synchronize()
