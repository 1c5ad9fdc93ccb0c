"""Merges the rows of waiting requests into runs. Knows no HTTP, no model file and no Ray; a loop and a runner are given.

A batch is closed when the engine is free, never by a timer: a lone request on an idle model does not wait, and while
the engine is busy requests gather. Rows are merged only within one model version (a batcher belongs to one) and for
equal sizes beyond the batch dimension, and they are cut by what was parsed, not by what a caller declared.
"""

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from pydantic import PositiveInt

from maas_ray.bundle.datatypes import Array
from maas_ray.errors import DeadlineExceeded, MaasError, Overloaded
from maas_ray.spec import Spec

log = logging.getLogger(__name__)

Tensors = Mapping[str, Array]
Done = Callable[[Tensors | None, MaasError | None], None]
"""Called once with the outputs or with the error, on the loop."""


class BatchSpec(Spec):
    """How rows are merged, and how many may wait."""

    max_batch_size: PositiveInt = 64
    """Most rows of one run. A single request with more rows runs alone."""
    max_queued_requests: PositiveInt = 512
    """Requests of one model version that may wait; one more is answered 503 at once."""
    max_queued_bytes: PositiveInt = 256 << 20
    """Bytes of bodies that may wait in one replica, over all its models."""


class Loop(Protocol):
    """The part of asyncio's loop that the batcher needs; tests drive it by hand."""

    def time(self) -> float: ...
    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def call_at(self, when: float, callback: Callable[[], object], /) -> Any: ...


class Runner(Protocol):
    """Runs merged rows: at once, or in a thread. One run at a time."""

    def start(self, inputs: Tensors, num_rows: int, finished: Done) -> None:
        """Starts a run; `finished` is called on the loop, possibly before this returns."""
        ...

    def estimate_s(self, num_rows: int) -> float:
        """Expected seconds of a run; infinity if unknown."""
        ...


class ByteBudget:
    """Bytes of waiting requests, shared by all batchers of a replica.

    Args:
        limit: most bytes that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Item:
    """One request in the queue or in a run. `done` is None once it has been answered, cancelled or has expired."""

    __slots__ = ("deadline", "done", "inputs", "key", "num_bytes", "num_rows")

    def __init__(self, inputs: Tensors, num_rows: int, num_bytes: int, deadline: float, done: Done) -> None:
        self.inputs = inputs
        self.num_rows = num_rows
        self.num_bytes = num_bytes
        self.deadline = deadline
        self.done: Done | None = done
        self.key: tuple[object, ...] = ()


class Batcher:
    """The queue of one model version.

    Args:
        runner: what runs a batch.
        spec: sizes and bounds.
        loop: asyncio's loop, or one driven by hand.
        can_merge: whether the model has a batch dimension.
        budget: bytes shared with the other batchers of the replica.
        name: of the model version, for messages.
    """

    def __init__(
        self,
        runner: Runner,
        spec: BatchSpec,
        loop: Loop,
        *,
        can_merge: bool,
        budget: ByteBudget | None = None,
        name: str = "model",
    ) -> None:
        self._runner = runner
        self._spec = spec
        self._loop = loop
        self._can_merge = can_merge
        self._budget = budget or ByteBudget(spec.max_queued_bytes)
        self._name = name
        self._groups: OrderedDict[tuple[object, ...], deque[Item]] = OrderedDict()
        self._retries: deque[list[Item]] = deque()
        self._running: list[Item] = []
        self._started_s: float | None = None
        self._num_queued = 0
        self._num_queued_rows = 0
        self._is_armed = False
        self._is_closed = False
        self._timer: Any = None
        self._timer_at = math.inf
        self._when_idle: list[Callable[[], None]] = []

    @property
    def num_queued(self) -> int:
        """Requests that wait for a run."""
        return self._num_queued

    @property
    def num_ongoing(self) -> int:
        """Requests that wait or run and still want an answer."""
        return self._num_queued + len(self._live(self._running)) + sum(len(self._live(part)) for part in self._retries)

    @property
    def busy_s(self) -> float:
        """Seconds since the current run started; 0 while the engine is free."""
        return 0.0 if self._started_s is None else self._loop.time() - self._started_s

    def submit(self, inputs: Tensors, num_rows: int, num_bytes: int, deadline: float, done: Done) -> Item:
        """Queues one request.

        Args:
            inputs: checked tensors, each with `num_rows` rows.
            num_rows: rows as parsed.
            num_bytes: what the request holds in memory, counted against the byte bound.
            deadline: time of the loop's clock after which nobody waits for the answer.
            done: called exactly once, unless the item is cancelled.

        Returns:
            The item, for `cancel`.

        Raises:
            Overloaded: the queue is full, or the version is being unloaded; nothing was queued.
            DeadlineExceeded: the deadline has passed already.
        """
        if self._is_closed:
            raise Overloaded(f"{self._name} is being unloaded; send the request again", 1.0)
        if self._num_queued >= self._spec.max_queued_requests:
            raise Overloaded(
                f"the queue of {self._name} is full: {self._num_queued} requests wait, the limit is "
                f"{self._spec.max_queued_requests}; send the request again later",
                self.retry_after_s(),
            )
        if self._budget.used + num_bytes > self._budget.limit:
            raise Overloaded(
                f"the queue of this replica is full: {self._budget.used} bytes wait and this request has {num_bytes}, "
                f"the limit is {self._budget.limit}; send the request again later, or a smaller one",
                self.retry_after_s(),
            )
        if deadline <= self._loop.time():
            raise DeadlineExceeded(f"the deadline passed before the request to {self._name} could be queued")
        item = Item(inputs, num_rows, num_bytes, deadline, done)
        if self._can_merge:
            item.key = tuple((name, array.shape[1:]) for name, array in inputs.items())
        self._groups.setdefault(item.key, deque()).append(item)
        self._num_queued += 1
        self._num_queued_rows += num_rows
        self._budget.used += num_bytes
        if deadline < self._timer_at:
            self._set_timer(deadline)
        self._arm()
        return item

    def cancel(self, item: Item) -> None:
        """Takes an item out; its `done` is not called any more. A run that has started goes on without it."""
        if item.done is None:
            return
        item.done = None
        group = self._groups.get(item.key)
        if group is not None and item in group:
            group.remove(item)
            self._forget(item)
            if not group:
                del self._groups[item.key]
        self._check_idle()

    def retry_after_s(self) -> float:
        """Seconds until what is queued now has been run, at the measured speed; at least 1."""
        num_runs = math.ceil(max(1, self._num_queued_rows) / self._spec.max_batch_size)
        if not self._can_merge:
            num_runs = max(1, self._num_queued)
        estimate = num_runs * self._runner.estimate_s(min(self._num_queued_rows, self._spec.max_batch_size) or 1)
        return max(1.0, estimate) if math.isfinite(estimate) else 1.0

    def close(self, when_idle: Callable[[], None] | None = None) -> None:
        """Takes no new request; what waits is still answered. Calls `when_idle` once the last one is."""
        self._is_closed = True
        if when_idle is not None:
            self._when_idle.append(when_idle)
        self._check_idle()

    def abort(self, error: MaasError) -> None:
        """Closes, and answers everything that still waits or runs with `error`."""
        self._is_closed = True
        waiting = [item for group in self._groups.values() for item in group]
        self._groups.clear()
        for item in waiting:
            self._forget(item)
        for item in [*waiting, *self._running, *(item for part in self._retries for item in part)]:
            self._answer(item, None, error)
        self._retries.clear()
        self._check_idle()

    def _arm(self) -> None:
        # Once per turn of the loop: all requests that arrived together share one run.
        if not self._is_armed and self._started_s is None:
            self._is_armed = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_armed = False
        if self._started_s is not None:
            return
        batch = self._next_batch()
        if not batch:
            self._check_idle()
            return
        self._running = batch
        self._started_s = self._loop.time()
        num_rows = sum(item.num_rows for item in batch)
        self._runner.start(_merge(batch), num_rows, self._finished)

    def _finished(self, outputs: Tensors | None, error: MaasError | None) -> None:
        batch, self._running, self._started_s = self._running, [], None
        num_rows = sum(item.num_rows for item in batch)
        if outputs is not None and len(batch) > 1 and any(len(array) != num_rows for array in outputs.values()):
            log.warning(
                "%s does not keep its rows apart (%d in); its requests run singly from now on", self._name, num_rows
            )
            self._can_merge = False
            self._retries.extend([item] for item in batch)
        elif error is not None and len(batch) > 1:
            middle = len(batch) // 2
            self._retries.extend((batch[:middle], batch[middle:]))
        elif outputs is None:
            for item in batch:
                self._answer(item, None, error)
        elif len(batch) == 1:
            self._answer(batch[0], outputs, None)
        else:
            start = 0
            for item in batch:
                stop = start + item.num_rows
                self._answer(item, {name: array[start:stop] for name, array in outputs.items()}, None)
                start = stop
        self._arm()

    def _next_batch(self) -> list[Item]:
        now = self._loop.time()
        while self._retries:
            part = self._live(self._retries.popleft())
            if part:
                return part
        while self._groups:
            # Groups take turns, so that no shape starves another; inside a group first come, first served.
            key, group = next(iter(self._groups.items()))
            batch: list[Item] = []
            num_rows = 0
            while group and (not batch or num_rows + group[0].num_rows <= self._spec.max_batch_size):
                item = group.popleft()
                self._forget(item)
                if item.deadline <= now:
                    self._expire(item)
                    continue
                batch.append(item)
                num_rows += item.num_rows
                if not self._can_merge:
                    break
            if group:
                self._groups.move_to_end(key)
            else:
                del self._groups[key]
            if batch:
                return batch
        return []

    def _forget(self, item: Item) -> None:
        self._num_queued -= 1
        self._num_queued_rows -= item.num_rows
        self._budget.used -= item.num_bytes

    def _answer(self, item: Item, outputs: Tensors | None, error: MaasError | None) -> None:
        done, item.done = item.done, None
        if done is None:
            return
        try:
            done(outputs, error)
        except Exception:  # one caller's callback must not take the answers of the others with it
            log.exception("the answer of %s could not be delivered", self._name)

    def _expire(self, item: Item) -> None:
        self._answer(
            item,
            None,
            DeadlineExceeded(
                f"{self._name} could not answer before the request's deadline; {self._num_queued} requests wait, "
                "allow more time or send fewer"
            ),
        )

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._sweep) if math.isfinite(when) else None

    def _sweep(self) -> None:
        """Answers whoever's deadline has passed, also while the engine is busy or stuck."""
        now = self._loop.time()
        for key, group in list(self._groups.items()):
            late = [item for item in group if item.deadline <= now]
            if late:
                self._groups[key] = deque(item for item in group if item.deadline > now)
                for item in late:
                    self._forget(item)
                    self._expire(item)
                if not self._groups[key]:
                    del self._groups[key]
        apart = [*self._running, *(item for part in self._retries for item in part)]
        for item in apart:
            if item.deadline <= now:
                self._expire(item)
        waiting = [*(item for group in self._groups.values() for item in group), *self._live(apart)]
        self._timer = None
        self._set_timer(min((item.deadline for item in waiting), default=math.inf))
        self._check_idle()

    def _check_idle(self) -> None:
        if self._is_closed and not self._groups and not self._retries and self._started_s is None:
            if self._timer is not None:
                self._set_timer(math.inf)
            callbacks, self._when_idle = self._when_idle, []
            for callback in callbacks:
                callback()

    @staticmethod
    def _live(items: list[Item]) -> list[Item]:
        return [item for item in items if item.done is not None]


def _merge(batch: list[Item]) -> Tensors:
    if len(batch) == 1:
        return batch[0].inputs
    return {name: np.concatenate([item.inputs[name] for item in batch]) for name in batch[0].inputs}
