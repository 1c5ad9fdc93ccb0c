"""Memory that was freed goes back to the operating system, which the C library does not do by itself. Knows no model.

glibc serves blocks below a limit from heaps of its own, one per thread, raises that limit up to 32 MiB whenever a large
block is freed, and cannot shrink the heap of a thread other than the first one. Measured: ten loads and unloads of a
model of 100 MiB leave 366 MiB behind, and 17 MiB if `malloc_trim` is called; six of one of 24 MiB leave 165 MiB in
spite of that call, more with each turn, and 17 MiB if its large blocks are kept out of the heaps as well.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 1 << 20
"""Blocks of this size get a mapping of their own while a model is loaded: Linux allows a process 65,530 of them."""
USUAL_BYTES = 32 << 20
"""What glibc itself ends at: buffers of requests and runs come from the heaps, without a page fault for each page."""

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
    """Gives back what was freed; does nothing where the C library has no such function (only glibc has).

    It takes up to 10 ms, with the interpreter's lock released: call it in a thread.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Large blocks that are taken inside go back to the system in the moment in which they are freed, whenever that is.

    The setting is the whole process's: what other threads take meanwhile costs them a few microseconds more.
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
