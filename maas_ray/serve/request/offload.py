"""Thread pool for work that would block the loop: parsing large bodies and writing large responses."""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.display import get_logger
from maas_ray.errors import MaasError, Overloaded, RunStopped
from maas_ray.serve.batching.spec import ByteBudget

log = get_logger(__name__)
T = TypeVar("T")

NUM_THREADS = 2
"""The threads share the interpreter with the loop, so more of them would only take more of it; two, so that one large
body does not block all others."""
MAX_WAITING = 128
"""Maximum number of waiting and running work items; further ones are refused."""


class _WorkItem(NamedTuple):
    work: Callable[[StopSignal], Any]
    num_bytes: int
    done: Callable[[Any, Exception | None], None]
    stop: StopSignal
    loop: asyncio.AbstractEventLoop


class Workers:
    """Executes work in threads, which the first work item starts.

    Args:
        budget: limit of waiting bytes in the replica; the bytes of a work item count until it has ended.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._jobs: SimpleQueue[_WorkItem | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.num_waiting = 0
        """Number of waiting and running work items."""

    def submit(
        self, work: Callable[[StopSignal], T], num_bytes: int, done: Callable[[T | None, Exception | None], None]
    ) -> StopSignal:
        """Submits a work item; called on the loop.

        Args:
            work: function to call in a thread; long work ends early once its argument `is_set`.
            num_bytes: memory that it uses, in addition to bytes counted elsewhere.
            done: called once on the loop with the result or the error, also after a stop.

        Returns:
            Signal that ends the work early.

        Raises:
            Overloaded: too many items or bytes wait already.
        """
        budget = self._budget
        if self.num_waiting >= MAX_WAITING:
            raise Overloaded(
                f"{self.num_waiting} large bodies and responses wait for a thread of this replica, the limit is "
                f"{MAX_WAITING}; retry later"
            )
        if budget.used + num_bytes > budget.limit:
            raise Overloaded(
                f"the queue of this replica is full: {budget.used} bytes wait, this request has {num_bytes}, the "
                f"limit is {budget.limit}; retry later, or send a smaller request"
            )
        if len(self._threads) <= min(self.num_waiting, NUM_THREADS - 1):  # each uses some memory of its own
            thread = threading.Thread(target=self._work, name=f"worker-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.num_waiting += 1
        budget.used += num_bytes
        stop = StopSignal()
        self._jobs.put(_WorkItem(work, num_bytes, done, stop, asyncio.get_running_loop()))
        return stop

    async def run(self, work: Callable[[StopSignal], T], num_bytes: int) -> T:
        """Submits a work item and awaits its result; the work ends early if the caller is cancelled.

        Raises:
            Overloaded: too many items or bytes wait already.
        """
        # In a list that is emptied: an error references this frame, which must not reference the error by its future.
        waiting: list[asyncio.Future[T]] = [asyncio.get_running_loop().create_future()]

        def done(result: T | None, error: Exception | None) -> None:
            if not waiting or waiting[0].done():
                return
            if error is not None:
                waiting[0].set_exception(error)
            else:
                waiting[0].set_result(result)  # type: ignore[arg-type]  # without an error there is a result

        stop = self.submit(work, num_bytes, done)
        try:
            return await waiting[0]
        finally:
            stop.set()
            waiting.clear()

    def close(self) -> None:
        """Ends the threads; work in progress ends by itself."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result: Any = None
            error: Exception | None = None
            try:
                if job.stop.is_set:
                    raise RunStopped("the work was cancelled before it started")
                result = job.work(job.stop)
            except MaasError as refusal:
                error = refusal
            except Exception as failure:
                log.exception("work in a thread failed unexpectedly")
                error = failure
            try:
                job.loop.call_soon_threadsafe(self._ended, job, result, error)
            except RuntimeError:
                log.info("work in a thread ended after its loop was closed; its result is discarded")
            del job, result, error  # this thread may now wait for a long time

    def _ended(self, job: _WorkItem, result: Any, error: Exception | None) -> None:
        self.num_waiting -= 1
        self._budget.used -= job.num_bytes
        job.done(result, error)


def check(stop: StopSignal) -> None:
    """Raises `RunStopped` if the work was cancelled; called between its steps."""
    if stop.is_set:
        raise RunStopped("the work was cancelled")
