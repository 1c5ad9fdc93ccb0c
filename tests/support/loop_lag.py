"""How long a loop was kept from everybody: the most processor time that its thread spent between two beats of a millisecond.

Processor time, because on a busy machine a thread stalls for reasons outside of the process.
"""

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

BEAT_S = 0.001


class LoopLag:
    """Beats on a loop; all methods are called on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest_s = 0.0
        self._loop = loop
        self._last_s = time.thread_time()
        self._timer = loop.call_later(BEAT_S, self._beat)

    def take(self) -> float:
        """The longest time since the last call."""
        longest_s, self.longest_s = self.longest_s, 0.0
        return longest_s

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        now_s = time.thread_time()
        self.longest_s = max(self.longest_s, now_s - self._last_s)
        self._last_s = now_s
        self._timer = self._loop.call_later(BEAT_S, self._beat)


@contextmanager
def garbage_as_in_a_replica() -> Iterator[None]:
    """What a test process holds besides the server is not looked through on the server's loop."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
