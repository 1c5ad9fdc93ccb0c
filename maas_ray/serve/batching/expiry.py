"""Expiry: answers requests at their deadlines, also while the engine is busy or stuck."""

import math
from collections.abc import Callable
from typing import Any

from maas_ray.errors import DeadlineExceeded
from maas_ray.serve.batching.item import Item, live
from maas_ray.serve.batching.ongoing import Ongoing
from maas_ray.serve.batching.protocols import Loop
from maas_ray.serve.batching.queueing.request_queue import Queue

_SWEEP_EVERY_S = 0.005
"""Minimum interval between searches for expired requests: each search scans the whole queue."""


class Expiry:
    """One timer for the earliest deadline of the waiting and running requests.

    Args:
        queue: waiting requests; expired ones are removed.
        ongoing: running requests; runs that nobody waits for any more are stopped.
        loop: clock and timers.
        name: name of the model version, for messages.
        swept: called after each search.
    """

    def __init__(self, queue: Queue, ongoing: Ongoing, loop: Loop, name: str, swept: Callable[[], None]) -> None:
        self.earliest = math.inf
        """Deadline for which the timer is set; infinity if none is."""
        self._queue = queue
        self._ongoing = ongoing
        self._loop = loop
        self._name = name
        self._swept = swept
        self._swept_s = -math.inf
        self._timer: Any = None

    def watch(self, deadline: float) -> None:
        """Sets the timer for a deadline that is earlier than `earliest`."""
        self.stop()
        if math.isfinite(deadline):
            self.earliest = deadline
            self._timer = self._loop.call_at(max(deadline, self._swept_s + _SWEEP_EVERY_S), self._sweep)

    def stop(self) -> None:
        """Cancels the timer."""
        self.earliest = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expire(self, item: Item) -> None:
        """Answers a request whose deadline has passed."""
        waiting = len(self._queue)
        text = f"{self._name} could not answer before the request's deadline; {waiting} other requests wait"
        item.deliver(None, DeadlineExceeded(f"{text}; allow more time or send fewer requests"), self._name)

    def _sweep(self) -> None:
        self._swept_s = now = self._loop.time()
        for item in [*self._queue, *self._ongoing.items]:
            if item.deadline <= now:
                self._queue.remove(item)
                self.expire(item)
        self._ongoing.stop_unwanted()
        waiting = [*self._queue, *live(self._ongoing.items)]
        self.watch(min((item.deadline for item in waiting), default=math.inf))
        self._swept()
