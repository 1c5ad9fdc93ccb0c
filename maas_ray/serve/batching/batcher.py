"""Merges the rows of waiting requests into runs. Knows no HTTP, no model file and no Ray; a loop and a runner are given.

A batch is closed when the engine is free: a lone request on an idle model does not wait (unless `max_delay_ms` asks for
it), and while the engine is busy requests gather. What a batch holds is the queue's choice (request_queue.py). A batcher belongs to one model version, so versions never share a run, and answers
are cut by what was parsed, not by what a caller declared.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from maas_ray.bundle.engine.forms import Form
from maas_ray.bundle.engine.padding import Padding
from maas_ray.display import get_logger
from maas_ray.errors import BadRequest, DeadlineExceeded, EngineDied, MaasError, Overloaded, RunStopped
from maas_ray.serve.batching.fair_queue import Key
from maas_ray.serve.batching.item import Done, Item, Tensors
from maas_ray.serve.batching.merge_guard import Guard, Sample
from maas_ray.serve.batching.quarantine import Quarantine
from maas_ray.serve.batching.request_queue import DEFAULT_TENANT, Queue
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget

log = get_logger(__name__)

_SWEEP_EVERY_S = 0.005
"""Expired requests are looked for at most so often: the search goes through the whole queue."""
_NOTHING: Tensors = {}


_VAIN = 0.5
"""A request is refused if the wait takes more than this share of its time: the rest is for its own run, and for error.
Measured at ten times the capacity of a model of 250 rows/s: with 0.7 about one answer in ten came after its deadline
whenever the machine was slower than expected for a moment; with 0.5 hardly any, and the queue still held two runs."""


_MOST_LOOKED_AT = 32
"""Groups of waiting requests whose time is summed; that of further ones is taken in proportion."""
_OVERDUE, _OVERDUE_S = 4.0, 0.25
"""A run that lasts longer than so many times its estimate, and so many seconds, is ended as soon as one of its requests
expires: something in it takes long, and the others are run again without it."""


class Loop(Protocol):
    """The part of asyncio's loop that the batcher needs; tests drive it by hand."""

    def time(self) -> float: ...
    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def call_at(self, when: float, callback: Callable[[], object], /) -> Any: ...


class Finished(Protocol):
    """Called once at the end of a run, on the loop: the outputs or the error, and the seconds it took."""

    def __call__(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None: ...


class CancelToken(Protocol):
    """Ends a run early."""

    def set(self) -> None:
        """Nobody waits for it. It still ends by its `Finished`, perhaps with `RunStopped`."""
        ...


class Runner(Protocol):
    """Runs merged rows: at once, or in a thread."""

    @property
    def instances(self) -> int:
        """Runs that may be started before the first of them has finished."""
        ...

    @property
    def form_of(self) -> Callable[[Tensors], Form] | None:
        """Gives the sizes of a run beyond its rows, where they vary; None: its rows say how large it is."""
        ...

    def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> CancelToken | None:
        """Starts a run; `finished` may be called before this returns. None: it cannot be ended early."""
        ...

    def estimate_s(self, num_rows: int, form: Form = (), /) -> float:
        """Expected seconds of a run; infinity if unknown. The form counts only where more than the rows varies."""
        ...


class RunStats(Protocol):
    """What is counted here; serve/telemetry/stats.py has it."""

    def waited(self, items: Sequence[Item], now_s: float) -> None:
        """Requests left the queue for their run, at the time `now_s` of the finest clock."""
        ...

    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        """A run ended well."""
        ...

    def checked(self, difference: str) -> None:
        """A merged request was run again alone; why merging has ended, if it differed."""
        ...


class BatchRun:
    """Requests that are being run together.

    Args:
        batcher: is told the end.
        items: whose rows are merged, in this order.
        num_rows: sum of theirs.
        started_s: time of the loop's clock.
    """

    __slots__ = ("batcher", "items", "num_rows", "started_s", "stop")

    def __init__(self, batcher: "Batcher", items: list[Item], num_rows: int, started_s: float) -> None:
        self.batcher = batcher
        self.items = items
        self.num_rows = num_rows
        self.started_s = started_s
        self.stop: CancelToken | None = None

    def finished(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None:
        """Cuts the outputs and answers; see `Finished`."""
        self.batcher._finished(self, outputs, error, run_s)


class CheckRun(BatchRun):
    """A request that was answered, run once more for the guard."""

    __slots__ = ("sample",)

    def __init__(self, batcher: "Batcher", sample: Sample, num_rows: int, started_s: float) -> None:
        super().__init__(batcher, [], num_rows, started_s)
        self.sample = sample

    def finished(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None:
        """Compares; see `Finished`."""
        self.batcher._checked(self, outputs)


class Batcher:
    """Queue and runs of one model version.

    Args:
        runner: what runs a batch.
        spec: sizes, bounds and delay.
        loop: asyncio's loop, or one driven by hand.
        can_merge: whether requests may share a run.
        padding: how requests of different sizes are made equal; None: they do not share a run.
        optional: names of inputs that a request may leave out; one that has any runs alone.
        budget: bytes shared with the other batchers of the replica.
        name: of the model version, for messages.
        stats: is told what waited and ran; None: nothing is counted.
    """

    def __init__(
        self,
        runner: Runner,
        spec: BatchSpec,
        loop: Loop,
        *,
        can_merge: bool,
        optional: frozenset[str] = frozenset(),
        padding: Padding | None = None,
        budget: ByteBudget | None = None,
        name: str = "model",
        stats: RunStats | None = None,
    ) -> None:
        self._runner = runner
        self._instances = runner.instances
        self._max_batch_size = spec.max_batch_size
        self._is_delayed = spec.max_delay_ms > 0
        self._loop = loop
        self._can_merge = can_merge
        form_of = self._form_of = runner.form_of
        self._optional = optional
        self._padding = padding if can_merge else None
        self._name = name
        self._stats = stats
        budget = budget or ByteBudget(spec.max_queued_bytes)
        self._queue = Queue(
            spec,
            budget,
            name,
            runner.estimate_s if form_of is None else lambda num_rows, key: runner.estimate_s(num_rows, _form(key)),
            lambda item, error: self._answer(item, None, error),
            self.retry_after_s,
        )
        self._retries: deque[list[Item]] = deque()
        """Parts of a run that failed, to be run apart."""
        self._quarantine = Quarantine()
        self._is_guarded = False
        """Something is in quarantine, so that each request is looked at."""
        self._runs: list[BatchRun] = []
        self._is_armed = False
        self._is_starting = False
        """A run that ends meanwhile was made at once, on the loop."""
        self._is_closed = False
        self._timer: Any = None
        self._timer_at = math.inf
        self._swept_s = -math.inf
        self._waker: Any = None
        self._when_idle: list[Callable[[], None]] = []
        self._guard = Guard(spec.check_share) if can_merge and spec.check_share else None
        self.problem = ""
        """Why requests do not share runs any more, where they did."""

    @property
    def max_batch_size(self) -> int:
        """Most rows of one run."""
        return self._max_batch_size

    def resize(self, max_batch_size: int) -> None:
        """Changes the most rows of one run, from the next one on."""
        self._max_batch_size = max_batch_size
        self._queue.resize(max_batch_size)

    @property
    def num_queued(self) -> int:
        """Requests that wait for a run."""
        return len(self._queue)

    @property
    def num_ongoing(self) -> int:
        """Requests that wait or run and still want an answer."""
        return len(self._queue) + len(_live(self._apart()))

    @property
    def busy_s(self) -> float:
        """Seconds since the oldest run in progress started; 0 while the engine is free."""
        return self._loop.time() - self._runs[0].started_s if self._runs else 0.0

    def submit(
        self,
        inputs: Tensors,
        num_rows: int,
        num_bytes: int,
        deadline: float,
        done: Done,
        *,
        tenant: str = DEFAULT_TENANT,
        priority: int = 0,
    ) -> Item:
        """Queues one request.

        Args:
            inputs: checked tensors, each with `num_rows` rows where rows are merged.
            num_rows: rows as parsed.
            num_bytes: what the request holds in memory, counted against the byte bound.
            deadline: time of the loop's clock after which nobody waits for the answer.
            done: called exactly once, unless the item is cancelled.
            tenant: whose request it is; tenants share the engine in equal parts.
            priority: among the requests of this tenant: 1 is the highest; 0 comes after all others.

        Returns:
            The item, for `cancel`.

        Raises:
            MaasError: as `put`.
        """
        item = Item(inputs, num_rows, num_bytes, deadline, done, priority)
        self.put(item, tenant)
        return item

    def put(self, item: Item, tenant: str = DEFAULT_TENANT) -> None:
        """Queues what the caller has made: `submit` for who has an item of his own.

        Raises:
            Overloaded: the queue is full, or the version is being unloaded; nothing was queued.
            DeadlineExceeded: the deadline has passed already.
            RequestQuarantined: the same values have twice ended the engine's process.
            BadRequest: a tensor has other than `num_rows` rows; merged, it would shift the rows of others.
        """
        deadline = item.deadline
        if self._is_closed:
            raise Overloaded(f"{self._name} is being unloaded; send the request again", 1.0)
        now = self._loop.time()
        if deadline <= now:
            raise DeadlineExceeded(f"the deadline passed before the request to {self._name} could be queued")
        inputs, num_rows = item.inputs, item.num_rows
        if self._is_guarded:
            self._is_guarded = self._quarantine.check(inputs, now, self._name)
        key: Key = ()
        if self._optional and not self._optional.isdisjoint(inputs):
            key = (item,)  # what it gives beside its rows holds for the whole run
        elif self._padding is not None:
            self._put_padded(self._padding, item, tenant, now)
            return
        elif self._can_merge:
            for name, array in inputs.items():
                shape = array.shape
                if shape[0] != num_rows:
                    raise BadRequest(f"input {name!r} has {shape[0]} rows and the request {num_rows}; send equal ones")
                key = key, name, array.dtype.num, shape[1:]  # by name: inputs may be optional
        if self._form_of is not None:
            key = self._form_of(inputs), key
        self._enqueue(item, key, tenant, now)

    def _put_padded(self, padding: Padding, item: Item, tenant: str, now: float) -> None:
        inputs, num_rows = item.inputs, item.num_rows
        if any(len(array) != num_rows for array in inputs.values()):
            raise BadRequest(f"the inputs have other numbers of rows than the request, {num_rows}; send equal ones")
        kinds: Key = tuple(array.dtype.num for array in inputs.values())
        is_alike = self._can_merge and padding.agrees(inputs)
        self._enqueue(item, (padding.form(inputs), kinds if is_alike else item), tenant, now)

    def _enqueue(self, item: Item, key: Key, tenant: str, now: float) -> None:
        deadline = item.deadline
        self._queue.put(item, key, tenant, now)
        if deadline < self._timer_at:
            self._set_timer(deadline)
        if not self._is_armed and len(self._runs) < self._instances:
            # Once per turn of the loop: all requests that arrived together share one run.
            self._is_armed = True
            self._loop.call_soon(self._pump)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no new request."""
        return self._is_closed

    @property
    def is_behind(self) -> bool:
        """Whether more waits than one run can take."""
        return self._queue.num_rows > self._max_batch_size

    def admit(self, deadline: float) -> None:
        """Refuses a request that would wait in vain, before it is worth parsing: an early no is of use to its caller.

        For what has no priority and must wait for more than one full run (`is_behind`). Nobody is refused while several
        tenants wait: the order between them is not that of arrival.

        Args:
            deadline: time of the loop's clock after which nobody waits.

        Raises:
            Overloaded: what waits already takes nearly as long as this request may wait.
        """
        if not self.is_behind or self._queue.num_tenants > 1:
            return
        wait_s, left_s = self._wait_s(), deadline - self._loop.time()
        if wait_s > _VAIN * left_s and math.isfinite(wait_s):
            raise Overloaded(
                f"{self._name} is behind: what waits takes about {wait_s:.1f} s, and the request may wait for "
                f"{max(0.0, left_s):.1f} s; send it again later, or allow more time",
                max(1.0, wait_s),
            )

    def cancel(self, item: Item) -> None:
        """Takes an item out; its `done` is not called any more. A run goes on without it, while anybody waits for it."""
        if item.done is not None:
            item.done = None
            if item.is_waiting:
                self._queue.remove(item)
            else:
                self._stop_unwanted()
            item.inputs = _NOTHING
            self._check_idle()

    def retry_after_s(self) -> float:
        """Seconds until what is queued now has been run, at the measured speed; at least 1."""
        wait_s = self._wait_s()
        return max(1.0, wait_s) if math.isfinite(wait_s) else 1.0

    def _wait_s(self) -> float:
        """Expected seconds until what is queued now has been run; infinity if the speed is unknown."""
        queue, estimate_s, most = self._queue, self._runner.estimate_s, self._max_batch_size
        if not queue.num_items:
            return estimate_s(1) / self._instances
        wait_s, num_seen = 0.0, 0
        for key, num_rows, num_items in islice(queue.by_key(), _MOST_LOOKED_AT):
            num_seen += num_items
            form = _form(key) if self._form_of is not None else ()
            if self._can_merge:
                wait_s += math.ceil(num_rows / most) * estimate_s(min(num_rows, most), form)
            else:
                wait_s += num_items * estimate_s(max(1, num_rows // num_items), form)
        return wait_s * queue.num_items / num_seen / self._instances

    def close(self, when_idle: Callable[[], None] | None = None) -> None:
        """Takes no new request; what waits is still answered. Calls `when_idle` once the last one is."""
        self._is_closed = True
        if when_idle is not None:
            self._when_idle.append(when_idle)
        self._arm()  # nobody comes any more to fill a delayed batch
        self._check_idle()

    def abort(self, error: MaasError) -> None:
        """Closes, and answers everything that still waits or runs with `error`."""
        self._is_closed = True
        waiting = list(self._queue)
        for item in waiting:
            self._queue.remove(item)
        for item in [*waiting, *self._apart()]:
            self._answer(item, None, error)
        self._retries.clear()
        self._stop_unwanted()
        self._check_idle()

    def _arm(self) -> None:
        if not self._is_armed and len(self._runs) < self._instances:
            self._is_armed = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_armed = False
        runs, queue = self._runs, self._queue
        while len(runs) < self._instances:
            now = self._loop.time()
            batch = self._next_batch(now) if queue.num_items or self._retries else None
            if not batch:
                if self._is_delayed:
                    self._wake_later()
                if self._is_closed:
                    self._check_idle()
                elif self._guard is not None and self._guard.sample is not None and not runs:
                    self._check(self._guard, now)
                return
            if len(batch) == 1:
                num_rows, inputs = batch[0].num_rows, batch[0].inputs
            else:
                num_rows, inputs = sum([item.num_rows for item in batch]), self._merge(batch)
            run = BatchRun(self, batch, num_rows, now)
            runs.append(run)
            self._is_starting = True
            run.stop = self._runner.start(inputs, num_rows, run.finished)
            self._is_starting = False
            if self._is_armed:  # it ran at once: the loop reads what has arrived meanwhile before the next one
                return

    def _next_batch(self, now: float) -> list[Item]:
        while self._retries:
            if part := _live(self._retries.popleft()):
                return part
        queue, stats = self._queue, self._stats
        is_anyone_late = queue.earliest <= now
        while batch := queue.take(self._can_merge, now, can_wait=not self._is_closed):
            if is_anyone_late:
                for item in batch:
                    if item.deadline <= now:
                        self._expire(item)
                batch = _live(batch)
                if not batch:
                    continue
            if stats is not None:
                stats.waited(batch, time.perf_counter())
            return batch
        return []

    def _wake_later(self) -> None:
        if self._waker is not None:
            self._waker.cancel()
        when = self._queue.wake_at()
        self._waker = self._loop.call_at(when, self._arm) if math.isfinite(when) else None

    def _finished(self, run: BatchRun, outputs: Tensors | None, error: MaasError | None, run_s: float) -> None:
        self._runs.remove(run)
        batch = run.items
        if outputs is not None and self._queue.num_items and not self._is_starting and not self._is_closed:
            # The engine has its next run while the loop writes the answers of this one.
            self._pump()
        if outputs is None:
            if isinstance(error, EngineDied):
                self._after_death(batch)
            elif isinstance(error, RunStopped):
                # Alone, so that the one that took so long holds up no other; the earliest deadline first.
                self._retries.extend([item] for item in sorted(_live(batch), key=lambda item: item.deadline))
            elif len(batch) == 1:
                self._answer(batch[0], None, error)
            else:
                # Halving finds one bad item among n in about 2 log2(n) runs; the others are answered on the way.
                middle = len(batch) // 2
                self._retries.extend((batch[:middle], batch[middle:]))
        else:
            if self._stats is not None:
                self._stats.ran(len(batch), run.num_rows, run_s)
                for item in batch:
                    item.run_s = run_s
            if len(batch) == 1:
                self._answer(batch[0], outputs, None)
            elif any(len(array) != run.num_rows for array in outputs.values()):
                self._stop_merging(f"a run of {run.num_rows} rows gave another number of rows")
                self._retries.extend([item] for item in batch)
            else:
                if self._guard is not None:
                    self._guard.left -= len(batch)
                    if self._guard.left <= 0:
                        self._guard.take(batch, outputs, self._padding)
                self._cut(batch, outputs)
        self._arm_for_more()

    def _arm_for_more(self) -> None:
        """Goes on, if there is more to do than to wait for requests."""
        guard = self._guard
        if (
            self._queue.num_items
            or self._retries
            or self._is_closed
            or (guard is not None and guard.sample is not None)
        ):
            self._arm()

    def _check(self, guard: Guard, now: float) -> None:
        """Runs a request again that was answered from a merged run; the engine is idle."""
        sample, guard.sample = guard.sample, None
        if sample is not None:
            inputs, num_rows = sample.feed()
            run = CheckRun(self, sample, num_rows, now)
            self._runs.append(run)
            self._runner.start(inputs, num_rows, run.finished)

    def _checked(self, run: CheckRun, outputs: Tensors | None) -> None:
        self._runs.remove(run)
        if outputs is not None and self._guard is not None:  # a run that failed has shown nothing
            difference = self._guard.compare(run.sample, outputs)
            if difference:
                self._stop_merging(difference)
            if self._stats is not None:
                self._stats.checked(self.problem)
        self._arm_for_more()

    def _stop_merging(self, reason: str) -> None:
        """Requests run one by one from now on: answers must not depend on who asks at the same time."""
        self.problem = f"{self._name} does not keep its rows apart: {reason}; its requests run one by one now"
        log.error("%s", self.problem)
        self._can_merge = False
        self._guard = None

    def _after_death(self, batch: list[Item]) -> None:
        """The engine's process died: each request is repeated once, alone; who was alone has done it."""
        for item in _live(batch):
            if not item.has_ended_process:
                item.has_ended_process = True
                self._retries.append([item])
                continue
            self._quarantine.add(item.inputs, self._loop.time())
            self._is_guarded = True
            self._answer(item, None, self._quarantine.refusal(self._name))

    def _merge(self, batch: list[Item]) -> Tensors:
        if self._padding is not None:
            return self._padding.merge([item.inputs for item in batch])
        return {name: np.concatenate([item.inputs[name] for item in batch]) for name in batch[0].inputs}

    def _cut(self, batch: list[Item], outputs: Tensors) -> None:
        """Answers each item with its own rows: views, by what was parsed."""
        padding = self._padding
        (first, first_array), *others = outputs.items()
        start = 0
        for item in batch:
            stop = start + item.num_rows
            done, item.done = item.done, None
            if done is not None:  # as `_answer`, for the many
                inputs, item.inputs = item.inputs, _NOTHING
                if padding is not None:
                    part = padding.own(inputs, outputs, start, stop)
                else:
                    part = {first: first_array[start:stop]}
                    for name, array in others:
                        part[name] = array[start:stop]
                try:
                    done(part, None)
                except Exception:
                    log.exception("the answer of %s could not be delivered", self._name)
            start = stop

    def _answer(self, item: Item, outputs: Tensors | None, error: MaasError | None) -> None:
        done, item.done = item.done, None
        if done is None:
            return
        item.inputs = _NOTHING  # a line may hold the item itself a little longer
        try:
            done(outputs, error)
        except Exception:  # one caller's callback must not take the answers of the others with it
            log.exception("the answer of %s could not be delivered", self._name)

    def _expire(self, item: Item) -> None:
        waiting = len(self._queue)
        text = f"{self._name} could not answer before the request's deadline; {waiting} other requests wait"
        self._answer(item, None, DeadlineExceeded(f"{text}, allow more time or send fewer"))

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        when = max(when, self._swept_s + _SWEEP_EVERY_S)
        self._timer = self._loop.call_at(when, self._sweep) if math.isfinite(when) else None

    def _sweep(self) -> None:
        """Answers whoever's deadline has passed, also while the engine is busy or stuck, and ends runs in vain."""
        self._swept_s = now = self._loop.time()
        for item in [*self._queue, *self._apart()]:
            if item.deadline <= now:
                self._queue.remove(item)
                self._expire(item)
        self._stop_unwanted()
        waiting = [*self._queue, *_live(self._apart())]
        self._timer = None
        self._set_timer(min((item.deadline for item in waiting), default=math.inf))
        self._check_idle()

    def _stop_unwanted(self) -> None:
        """Ends runs for which nobody waits, and those that go on for so long that one made others late."""
        for run in self._runs:
            live = _live(run.items)
            if run.stop is not None and len(live) < len(run.items) and (not live or self._is_overdue(run, live[0])):
                run.stop.set()
                run.stop = None

    def _is_overdue(self, run: BatchRun, item: Item) -> bool:
        form = self._form_of(item.inputs) if self._form_of is not None else ()
        expected_s = self._runner.estimate_s(run.num_rows, form)
        return self._loop.time() - run.started_s > max(_OVERDUE * expected_s, _OVERDUE_S)

    def _apart(self) -> list[Item]:
        """Items that are in a run, or wait to be run again."""
        running = (item for run in self._runs for item in run.items)
        return [*running, *(item for part in self._retries for item in part)]

    def _check_idle(self) -> None:
        if self._is_closed and not self._queue and not self._retries and not self._runs:
            self._set_timer(math.inf)
            if self._waker is not None:
                self._waker.cancel()
            callbacks, self._when_idle = self._when_idle, []
            for callback in callbacks:
                callback()


def _form(key: Key) -> Form:
    """The form that `put` has made a part of the key."""
    form: Form = key[0]  # type: ignore[assignment]
    return form


def _live(items: list[Item]) -> list[Item]:
    return [item for item in items if item.done is not None]
