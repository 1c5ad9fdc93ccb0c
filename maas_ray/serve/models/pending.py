"""Requests that wait for the load of a model: limited in number, bytes and time."""

import asyncio
from collections.abc import Callable

from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget
from maas_ray.serve.models.loaded import Loaded

log = get_logger(__name__)

LoadDone = Callable[[Loaded | None, MaasError | None], None]
"""Callback with the model or the error, called once, on the loop. The model is not unloaded before a request that the
callback queues."""


class Waiter:
    """One request that waits for a load; after `cancel` its callback is not called."""

    __slots__ = ("_load", "_timer", "done", "num_bytes", "version")

    def __init__(self, load: "Load", version: int | None, num_bytes: int, deadline: float, done: LoadDone) -> None:
        self._load = load
        self._timer = load.loop.call_at(deadline, load.expire, self)
        self.version = version
        self.num_bytes = num_bytes
        self.done: LoadDone | None = done

    def cancel(self) -> None:
        """Removes a request whose client has disconnected; has no effect once it was answered."""
        if self.done is not None:
            self.done = None
            self.leave()

    def leave(self) -> None:
        """Releases the bytes of the wait."""
        self._timer.cancel()
        self._load.remove(self)


class Load:
    """One load in progress, and the requests that wait for it.

    Args:
        what: name of the model, for messages.
        spec: maximum number of requests that may wait for one model.
        budget: limit of waiting bytes, shared with the queues of the replica.
    """

    def __init__(self, what: str, spec: BatchSpec, budget: ByteBudget) -> None:
        self.loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] | None = None
        self.error: MaasError | None = None
        """Why the load failed, if it did."""
        self.is_firm = False
        """Whether it continues even if no request waits for it."""
        self.obstacle = ""
        """What blocks the load itself, if anything."""
        self.version: int | None = None
        """Version that is being loaded, once known."""
        self._what = what
        self._limit = spec.max_queued_requests
        self._budget = budget
        self._waiters: dict[Waiter, None] = {}

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for it."""
        return len(self._waiters)

    @property
    def is_wanted(self) -> bool:
        """Whether there is still a reason to start it."""
        return self.is_firm or bool(self._waiters)

    def add(self, version: int | None, deadline: float, done: LoadDone, num_bytes: int) -> Waiter:
        """Adds a waiting request.

        Raises:
            Overloaded: too many requests or bytes wait already.
            DeadlineExceeded: the deadline has already passed.
        """
        if deadline <= self.loop.time():
            raise DeadlineExceeded(f"the deadline passed before the request could wait for {self._what} to be loaded")
        if len(self._waiters) >= self._limit:
            raise Overloaded(
                f"{self._what} is being loaded and {len(self._waiters)} requests wait for it, the limit is "
                f"{self._limit}; retry later"
            )
        if self._budget.used + num_bytes > self._budget.limit:
            raise Overloaded(
                f"the queue of this replica is full: {self._budget.used} bytes wait, this request has {num_bytes}, "
                f"the limit is {self._budget.limit}; retry later, or send a smaller request"
            )
        waiter = Waiter(self, version, num_bytes, deadline, done)
        self._waiters[waiter] = None
        self._budget.used += num_bytes
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Removes a waiter."""
        del self._waiters[waiter]
        self._budget.used -= waiter.num_bytes

    def expire(self, waiter: Waiter) -> None:
        """Answers a waiter whose deadline has passed; the load continues for the others."""
        why = f", since {self.obstacle}" if self.obstacle else ""
        text = f"{self._what} was not loaded before the request's deadline{why}; allow more time"
        _tell(waiter, DeadlineExceeded(text))

    def finish(self, answer: Callable[[int | None], Loaded | MaasError]) -> None:
        """Answers all waiters, each for the version that it requested."""
        for waiter in list(self._waiters):
            if waiter.done is not None:  # the callback of another waiter may have cancelled it
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
    except Exception:  # a failed callback must not lose the responses of other callers
        log.exception("a request that waited for a model could not continue")
