"""Returns freed memory to the operating system, which the C library does not do by itself. Independent of models.

glibc allocates blocks below a limit from per-thread heaps, raises that limit up to 32 MiB whenever a large block is
freed, and cannot shrink the heap of a thread other than the first one. Measured: ten loads and unloads of a model of
100 MiB leave 366 MiB allocated, and 17 MiB if `malloc_trim` is called; six of a model of 24 MiB leave 165 MiB despite
that call, more with each cycle, and 17 MiB if its large blocks are also kept out of the heaps.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 1 << 20
"""Blocks of this size get a separate mapping while a model is loaded: Linux allows a process 65,530 mappings."""
USUAL_BYTES = 32 << 20
"""glibc's own maximum: buffers of requests and runs come from the heaps, without a page fault for each page."""

_lock = threading.Lock()
_num_inside = 0


def _find(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found


_malloc_trim, _mallopt = _find("malloc_trim"), _find("mallopt")


def return_to_system() -> None:
    """Returns freed memory; does nothing if the C library has no such function (only glibc has it).

    It takes up to 10 ms, with the interpreter's lock released: call it in a thread.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Large blocks that are allocated inside are returned to the system as soon as they are freed, at any time.

    The setting affects the whole process: allocations of other threads meanwhile take a few microseconds longer.
    """
    if _malloc_trim is None or _mallopt is None:  # another library's mallopt may mean something else
        yield
        return
    global _num_inside
    with _lock:
        _num_inside += 1
        _mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                _mallopt(_M_MMAP_THRESHOLD, USUAL_BYTES)
                _mallopt(_M_TRIM_THRESHOLD, 2 * USUAL_BYTES)
