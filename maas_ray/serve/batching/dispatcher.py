"""Dispatcher: closes a batch whenever the engine is free, runs it, and distributes the result."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from maas_ray.errors import MaasError
from maas_ray.serve.batching.expiry import Expiry
from maas_ray.serve.batching.failed_runs import FailedRuns
from maas_ray.serve.batching.item import Item, Tensors, live
from maas_ray.serve.batching.merge_guard import Guard, Sample
from maas_ray.serve.batching.merger import Merger
from maas_ray.serve.batching.ongoing import BatchRun, Ongoing
from maas_ray.serve.batching.protocols import Loop, Runner, RunStats
from maas_ray.serve.batching.queueing.request_queue import Queue


class Dispatcher:
    """Keeps the instances of the engine busy while requests wait.

    Args:
        runner: executes the runs.
        loop: schedules the runs.
        queue: waiting requests.
        ongoing: current runs.
        merger: joins and splits the rows of a run.
        failed_runs: selects the requests to be run again.
        expiry: answers requests that expired in the queue.
        is_delayed: whether a batch may wait for more requests although the engine is free.
        stats: receives statistics of waits and runs; None: no statistics.
        name: name of the model version, for messages.
        check_idle: called after a search for work that found none, once `is_closed`.
    """

    def __init__(
        self,
        runner: Runner,
        loop: Loop,
        queue: Queue,
        ongoing: Ongoing,
        merger: Merger,
        failed_runs: FailedRuns,
        expiry: Expiry,
        *,
        is_delayed: bool,
        stats: RunStats | None,
        name: str,
        check_idle: Callable[[], None],
    ) -> None:
        self.is_armed = False
        """Whether a search for work is scheduled."""
        self.is_closed = False
        """Whether no further request will fill a batch."""
        self.instances = runner.instances
        """Maximum number of concurrent runs."""
        self._runner = runner
        self._loop = loop
        self._queue = queue
        self._runs = ongoing.runs
        self._parts = ongoing.retries
        self._merger = merger
        self._failed_runs = failed_runs
        self._expiry = expiry
        self._is_delayed = is_delayed
        self._stats = stats
        self._name = name
        self._check_idle = check_idle
        self._is_starting = False
        """True while a run is being started; a run that ends during that time ran inline, on the loop."""
        self._waker: Any = None

    def arm(self) -> None:
        """Schedules a search for work if the engine is free.

        Once per iteration of the loop: all requests that arrived together share one run.
        """
        if not self.is_armed and len(self._runs) < self.instances:
            self.is_armed = True
            self._loop.call_soon(self._pump)

    def stop_waiting(self) -> None:
        """Cancels the timer of a delayed batch."""
        if self._waker is not None:
            self._waker.cancel()

    def ended(self, run: BatchRun, outputs: Tensors | None, error: MaasError | None, run_s: float) -> None:
        queue, batch = self._queue, run.items
        self._runs.remove(run)
        if outputs is None:
            self._failed_runs.handle(batch, error, self._loop.time())
        else:
            if queue.num_items and not self._is_starting and not self.is_closed:
                # The engine starts its next run while the loop writes the responses of this one.
                self._pump()
            if self._stats is not None:
                self._stats.ran(len(batch), run.num_rows, run_s)
                for item in batch:
                    item.run_s = run_s
            if len(batch) == 1:
                batch[0].deliver(outputs, None, self._name)
            elif not self._merger.split(batch, run.num_rows, outputs):
                self._failed_runs.retry_singly(batch)
        self._arm_for_more()

    def _pump(self) -> None:
        self.is_armed = False
        runs, queue = self._runs, self._queue
        while len(runs) < self.instances:
            batch: list[Item] = []
            if queue.num_items or self._parts:
                now = self._loop.time()
                batch = self._next_batch(now)
            if not batch:
                if self._is_delayed:
                    self._wake_later()
                guard = self._merger.guard
                if self.is_closed:
                    self._check_idle()
                elif guard is not None and guard.sample is not None and not runs:
                    self._check(guard, guard.sample)
                return
            if len(batch) == 1:
                num_rows, inputs = batch[0].num_rows, batch[0].inputs
            else:
                num_rows, inputs = sum([item.num_rows for item in batch]), self._merger.join(batch)
            run = BatchRun(self, batch, num_rows, now)
            runs.append(run)
            self._is_starting = True
            run.stop = self._runner.start(inputs, num_rows, run.finished)
            self._is_starting = False
            if self.is_armed:  # it ran inline: the loop reads new requests before the next run
                return

    def _next_batch(self, now: float) -> list[Item]:
        if self._parts and (part := self._failed_runs.next_part()):
            return part
        queue, stats = self._queue, self._stats
        is_anyone_late = queue.earliest <= now
        while batch := queue.take(self._merger.can_merge, now, can_wait=not self.is_closed):
            if is_anyone_late:
                for item in batch:
                    if item.deadline <= now:
                        self._expiry.expire(item)
                batch = live(batch)
                if not batch:
                    continue
            if stats is not None:
                stats.waited(batch, time.perf_counter())
            return batch
        return []

    def _wake_later(self) -> None:
        self.stop_waiting()
        when = self._queue.wake_at()
        self._waker = self._loop.call_at(when, self.arm) if math.isfinite(when) else None

    def _arm_for_more(self) -> None:
        guard = self._merger.guard
        if self._queue.num_items or self._parts or self.is_closed or (guard is not None and guard.sample is not None):
            self.arm()

    def _check(self, guard: Guard, sample: Sample) -> None:
        """Repeats a request that was answered from a merged run; the engine is idle."""
        guard.sample = None
        inputs, num_rows = sample.feed()
        run = BatchRun(self, [], num_rows, self._loop.time())
        self._runs.append(run)
        self._runner.start(inputs, num_rows, partial(self._checked, run, sample))

    def _checked(
        self, run: BatchRun, sample: Sample, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /
    ) -> None:
        """Compares the outputs of a repeated run; see `Finished`. A failed one proves nothing."""
        self._runs.remove(run)
        merger = self._merger
        if outputs is not None and merger.guard is not None:
            if difference := merger.guard.compare(sample, outputs):
                merger.stop(difference)
            if self._stats is not None:
                self._stats.checked(merger.problem)
        self._arm_for_more()
