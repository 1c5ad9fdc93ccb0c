"""Requests that wait until a model is in memory: bounded in number, in bytes and in time. Loads nothing."""

import asyncio
from collections.abc import Callable

from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget
from maas_ray.serve.models.loaded import Loaded

log = get_logger(__name__)

LoadDone = Callable[[Loaded | None, MaasError | None], None]
"""Called once with the model or with the error, on the loop. A request that is queued before it returns is safe: the
model is not unloaded under it."""


class Waiter:
    """One request that waits for a load; `cancel` takes it out, and its callback is not called any more."""

    __slots__ = ("_load", "_timer", "done", "num_bytes", "version")

    def __init__(self, load: "Load", version: int | None, num_bytes: int, deadline: float, done: LoadDone) -> None:
        self._load = load
        self._timer = load.loop.call_at(deadline, load.expire, self)
        self.version = version
        self.num_bytes = num_bytes
        self.done: LoadDone | None = done

    def cancel(self) -> None:
        """Frees the place of a caller who has gone; harmless once it was answered."""
        if self.done is not None:
            self.done = None
            self.leave()

    def leave(self) -> None:
        """Gives back what waiting took."""
        self._timer.cancel()
        self._load.remove(self)


class Load:
    """One load in progress and those who wait for it.

    Args:
        what: of which model, for messages.
        spec: how many requests may wait for one model.
        budget: bytes that may wait, shared with the queues of the replica.
    """

    def __init__(self, what: str, spec: BatchSpec, budget: ByteBudget) -> None:
        self.loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] | None = None
        self.error: MaasError | None = None
        """Why it has ended without what was asked for."""
        self.is_firm = False
        """Goes on although nobody waits for it."""
        self.obstacle = ""
        """What it is waiting for itself."""
        self.version: int | None = None
        """What is being loaded, once that is known."""
        self._what = what
        self._limit = spec.max_queued_requests
        self._budget = budget
        self._waiters: dict[Waiter, None] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that wait for it."""
        return len(self._waiters)

    @property
    def is_wanted(self) -> bool:
        """Whether there is still a reason to begin with it."""
        return self.is_firm or bool(self._waiters)

    def add(self, version: int | None, deadline: float, done: LoadDone, num_bytes: int) -> Waiter:
        """Lets a request wait.

        Raises:
            Overloaded: too many requests or bytes wait already.
            DeadlineExceeded: the deadline has passed already.
        """
        if deadline <= self.loop.time():
            raise DeadlineExceeded(f"the deadline passed before the request to {self._what} could wait for its load")
        if len(self._waiters) >= self._limit:
            raise Overloaded(
                f"{self._what} is being loaded and {len(self._waiters)} requests wait for it, the limit is "
                f"{self._limit}; send the request again later"
            )
        if self._budget.used + num_bytes > self._budget.limit:
            raise Overloaded(
                f"the queue of this replica is full: {self._budget.used} bytes wait and this request has {num_bytes}, "
                f"the limit is {self._budget.limit}; send it again later, or a smaller one"
            )
        waiter = Waiter(self, version, num_bytes, deadline, done)
        self._waiters[waiter] = None
        self._budget.used += num_bytes
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Forgets a waiter."""
        del self._waiters[waiter]
        self._budget.used -= waiter.num_bytes

    def expire(self, waiter: Waiter) -> None:
        """Answers a waiter whose deadline has come; the load goes on for the others."""
        why = f", since {self.obstacle}" if self.obstacle else ""
        text = f"{self._what} was not loaded before the request's deadline{why}; allow more time"
        _tell(waiter, DeadlineExceeded(text))

    def finish(self, answer: Callable[[int | None], Loaded | MaasError]) -> None:
        """Answers all who wait, each for the version it asked for."""
        for waiter in list(self._waiters):
            if waiter.done is not None:  # the callback of another one may have cancelled it
                _tell(waiter, answer(waiter.version))


def _tell(waiter: Waiter, answer: Loaded | MaasError) -> None:
    done, waiter.done = waiter.done, None
    waiter.leave()
    if done is None:
        return
    try:
        if isinstance(answer, Loaded):
            done(answer, None)
        else:
            done(None, answer)
    except Exception:  # one caller's callback must not take the answers of the others with it
        log.exception("a request that waited for a model could not go on")
