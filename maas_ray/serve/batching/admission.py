"""Admission: estimates how long requests must wait, and refuses those that would wait in vain."""

import math
from itertools import islice

from maas_ray.errors import Overloaded
from maas_ray.serve.batching.merger import Merger
from maas_ray.serve.batching.protocols import Loop, Runner
from maas_ray.serve.batching.queueing.request_queue import Queue

_VAIN = 0.5
"""A request is refused if the wait takes more than this share of its time; the rest is for its own run and for
estimation errors. Measured at ten times the capacity of a model of 250 rows/s: with 0.7 about one response in ten was
after its deadline whenever the machine was slower than expected for a moment; with 0.5 hardly any, and the queue still
held two runs."""
_MOST_LOOKED_AT = 32
"""Groups of waiting requests whose run time is summed; the time of further groups is extrapolated."""


class Admission:
    """Expected waits in one queue.

    Args:
        queue: waiting requests.
        merger: whether they share runs.
        runner: estimates the time of a run.
        loop: clock.
        name: name of the model version, for messages.
    """

    def __init__(self, queue: Queue, merger: Merger, runner: Runner, loop: Loop, name: str) -> None:
        self._queue = queue
        self._merger = merger
        self._runner = runner
        self._loop = loop
        self._name = name

    def check(self, deadline: float) -> None:
        """Refuses a request that could not be answered before its deadline, on the loop's clock; see `Batcher.admit`.

        Raises:
            Overloaded: the waiting requests take nearly as long as this request may wait.
        """
        wait_s, left_s = self.wait_s(), deadline - self._loop.time()
        if wait_s > _VAIN * left_s and math.isfinite(wait_s):
            raise Overloaded(
                f"{self._name} is overloaded: the waiting requests take about {wait_s:.1f} s, and this request's "
                f"deadline is in {max(0.0, left_s):.1f} s; retry later, or allow more time",
                max(1.0, wait_s),
            )

    def retry_after_s(self) -> float:
        """Returns the seconds until the queued requests have been run, at the measured speed; at least 1."""
        wait_s = self.wait_s()
        return max(1.0, wait_s) if math.isfinite(wait_s) else 1.0

    def wait_s(self) -> float:
        """Returns the expected seconds until the queued requests have been run; infinity if the speed is unknown."""
        queue, estimate_s, most = self._queue, self._runner.estimate_s, self._queue.max_rows
        instances = self._runner.instances
        if not queue.num_items:
            return estimate_s(1) / instances
        wait_s, num_seen = 0.0, 0
        for key, num_rows, num_items in islice(queue.by_key(), _MOST_LOOKED_AT):
            num_seen += num_items
            form = self._merger.form(key)
            if self._merger.can_merge:
                wait_s += math.ceil(num_rows / most) * estimate_s(min(num_rows, most), form)
            else:
                wait_s += num_items * estimate_s(max(1, num_rows // num_items), form)
        return wait_s * queue.num_items / num_seen / instances
