"""Dynamic batcher: merges the rows of waiting requests into runs. Independent of HTTP, model files and Ray.

A batch is closed when the engine is free: a lone request on an idle model does not wait (unless `max_delay_ms` is set),
and while the engine is busy, requests accumulate. The queue selects the requests of a batch (request_queue.py). A
batcher belongs to one model version, so versions never share a run. Outputs are split by the number of rows that was
parsed, not by the number that a caller declared. The loop and the runner are passed in.
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
from maas_ray.serve.batching.queueing.fair_queue import Key
from maas_ray.serve.batching.item import Done, Item, Tensors
from maas_ray.serve.batching.merge_guard import Guard, Sample
from maas_ray.serve.batching.quarantine import Quarantine
from maas_ray.serve.batching.queueing.request_queue import DEFAULT_TENANT, Queue
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget

log = get_logger(__name__)

_SWEEP_EVERY_S = 0.005
"""Minimum interval between searches for expired requests: each search scans the whole queue."""
_NOTHING: Tensors = {}


_VAIN = 0.5
"""A request is refused if the wait takes more than this share of its time; the rest is for its own run and for
estimation errors. Measured at ten times the capacity of a model of 250 rows/s: with 0.7 about one response in ten was
after its deadline whenever the machine was slower than expected for a moment; with 0.5 hardly any, and the queue still
held two runs."""


_MOST_LOOKED_AT = 32
"""Groups of waiting requests whose run time is summed; the time of further groups is extrapolated."""
_OVERDUE, _OVERDUE_S = 4.0, 0.25
"""A run that takes longer than this multiple of its estimate, and longer than this many seconds, is stopped as soon as
one of its requests expires: one of them is slow, and the others are run again without it."""


class Loop(Protocol):
    """The methods of asyncio's loop that the batcher uses; tests provide a manual one."""

    def time(self) -> float: ...
    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def call_at(self, when: float, callback: Callable[[], object], /) -> Any: ...


class Finished(Protocol):
    """Callback at the end of a run, called once, on the loop: the outputs or the error, and the run time in seconds."""

    def __call__(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None: ...


class CancelToken(Protocol):
    """Stops a run early."""

    def set(self) -> None:
        """Requests the stop. The run still ends by its `Finished`, possibly with `RunStopped`."""
        ...


class Runner(Protocol):
    """Runs merged rows, either immediately or in a thread."""

    @property
    def instances(self) -> int:
        """Maximum number of concurrent runs."""
        ...

    @property
    def form_of(self) -> Callable[[Tensors], Form] | None:
        """Function that returns the variable sizes of a run other than its rows; None: only the rows vary."""
        ...

    def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> CancelToken | None:
        """Starts a run; `finished` may be called before this returns. Returns None if the run cannot be stopped."""
        ...

    def estimate_s(self, num_rows: int, form: Form = (), /) -> float:
        """Returns the expected seconds of a run; infinity if unknown. `form`: sizes other than rows, if they vary."""
        ...


class RunStats(Protocol):
    """Receiver of the batcher's statistics; implemented by serve/telemetry/stats.py."""

    def waited(self, items: Sequence[Item], now_s: float) -> None:
        """Records that requests left the queue for their run, at time `now_s` of the finest clock."""
        ...

    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        """Records a run that succeeded."""
        ...

    def checked(self, difference: str) -> None:
        """Records that a merged request was run again alone; `difference` is the reason if merging has ended."""
        ...


class BatchRun:
    """Requests in one run.

    Args:
        batcher: receives the result.
        items: requests whose rows are merged, in this order.
        num_rows: sum of their rows.
        started_s: start time on the loop's clock.
    """

    __slots__ = ("batcher", "items", "num_rows", "started_s", "stop")

    def __init__(self, batcher: "Batcher", items: list[Item], num_rows: int, started_s: float) -> None:
        self.batcher = batcher
        self.items = items
        self.num_rows = num_rows
        self.started_s = started_s
        self.stop: CancelToken | None = None

    def finished(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None:
        """Splits the outputs and answers the requests; see `Finished`."""
        self.batcher._finished(self, outputs, error, run_s)


class CheckRun(BatchRun):
    """Repeated run of an answered request, for the merge guard."""

    __slots__ = ("sample",)

    def __init__(self, batcher: "Batcher", sample: Sample, num_rows: int, started_s: float) -> None:
        super().__init__(batcher, [], num_rows, started_s)
        self.sample = sample

    def finished(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None:
        """Compares the outputs; see `Finished`."""
        self.batcher._checked(self, outputs)


class Batcher:
    """Queue and runs of one model version.

    Args:
        runner: executes the runs.
        spec: sizes, limits and delay.
        loop: asyncio's loop, or a manual one in tests.
        can_merge: whether requests may share a run.
        padding: pads requests of different sizes to one size; None: requests of different sizes do not share a run.
        optional: names of optional inputs; a request with any of them runs alone.
        budget: byte budget shared with the other batchers of the replica.
        name: name of the model version, for messages.
        stats: receives statistics of waits and runs; None: no statistics.
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
        """Parts of a failed run, to be run separately."""
        self._quarantine = Quarantine()
        self._is_guarded = False
        """Whether any request is in quarantine, so that every request must be checked."""
        self._runs: list[BatchRun] = []
        self._is_armed = False
        self._is_starting = False
        """True while a run is being started; a run that ends during that time ran inline, on the loop."""
        self._is_closed = False
        self._timer: Any = None
        self._timer_at = math.inf
        self._swept_s = -math.inf
        self._waker: Any = None
        self._when_idle: list[Callable[[], None]] = []
        self._guard = Guard(spec.check_share) if can_merge and spec.check_share else None
        self.problem = ""
        """Why requests no longer share runs; empty if they do, or never did."""

    @property
    def max_batch_size(self) -> int:
        """Maximum rows of one run."""
        return self._max_batch_size

    def resize(self, max_batch_size: int) -> None:
        """Changes the maximum rows of one run, effective with the next run."""
        self._max_batch_size = max_batch_size
        self._queue.resize(max_batch_size)

    @property
    def num_queued(self) -> int:
        """Number of requests that wait for a run."""
        return len(self._queue)

    @property
    def num_ongoing(self) -> int:
        """Number of waiting and running requests that have not been answered or cancelled."""
        return len(self._queue) + len(_live(self._apart()))

    @property
    def busy_s(self) -> float:
        """Seconds since the oldest current run started; 0 while the engine is idle."""
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
            inputs: validated tensors, each with `num_rows` rows if rows are merged.
            num_rows: number of rows as parsed.
            num_bytes: memory used by the request; counts against the byte limit.
            deadline: time on the loop's clock after which the response is not wanted.
            done: called exactly once, unless the item is cancelled.
            tenant: owner of the request; tenants share the engine equally.
            priority: priority among the requests of this tenant: 1 is the highest; 0 is lower than all others.

        Returns:
            The item, for `cancel`.

        Raises:
            MaasError: see `put`.
        """
        item = Item(inputs, num_rows, num_bytes, deadline, done, priority)
        self.put(item, tenant)
        return item

    def put(self, item: Item, tenant: str = DEFAULT_TENANT) -> None:
        """Queues an item; `submit` creates the item as well.

        Raises:
            Overloaded: the queue is full, or the version is being unloaded; nothing was queued.
            DeadlineExceeded: the deadline has already passed.
            RequestQuarantined: the same values have ended the engine's process twice.
            BadRequest: a tensor does not have `num_rows` rows; merging it would shift the rows of other requests.
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
            key = (item,)  # optional inputs apply to the whole run
        elif self._padding is not None:
            self._put_padded(self._padding, item, tenant, now)
            return
        elif self._can_merge:
            for name, array in inputs.items():
                shape = array.shape
                if shape[0] != num_rows:
                    raise BadRequest(f"input {name!r} has {shape[0]} rows, the request {num_rows}; send equal numbers")
                key = key, name, array.dtype.num, shape[1:]  # by name: inputs may be optional
        if self._form_of is not None:
            key = self._form_of(inputs), key
        self._enqueue(item, key, tenant, now)

    def _put_padded(self, padding: Padding, item: Item, tenant: str, now: float) -> None:
        inputs, num_rows = item.inputs, item.num_rows
        if any(len(array) != num_rows for array in inputs.values()):
            raise BadRequest(f"the inputs do not all have the request's {num_rows} rows; send equal numbers")
        kinds: Key = tuple(array.dtype.num for array in inputs.values())
        is_alike = self._can_merge and padding.agrees(inputs)
        self._enqueue(item, (padding.form(inputs), kinds if is_alike else item), tenant, now)

    def _enqueue(self, item: Item, key: Key, tenant: str, now: float) -> None:
        deadline = item.deadline
        self._queue.put(item, key, tenant, now)
        if deadline < self._timer_at:
            self._set_timer(deadline)
        if not self._is_armed and len(self._runs) < self._instances:
            # Once per iteration of the loop: all requests that arrived together share one run.
            self._is_armed = True
            self._loop.call_soon(self._pump)

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused."""
        return self._is_closed

    @property
    def is_behind(self) -> bool:
        """Whether more rows are waiting than one run can take."""
        return self._queue.num_rows > self._max_batch_size

    def admit(self, deadline: float) -> None:
        """Refuses a request that could not be answered in time, before it is parsed: an early refusal helps the client.

        Only for requests without a priority that must wait for more than one full run (`is_behind`). Nothing is refused
        while several tenants have requests waiting: those are not run in order of arrival.

        Args:
            deadline: time on the loop's clock after which the response is not wanted.

        Raises:
            Overloaded: the waiting requests take nearly as long as this request may wait.
        """
        if not self.is_behind or self._queue.num_tenants > 1:
            return
        wait_s, left_s = self._wait_s(), deadline - self._loop.time()
        if wait_s > _VAIN * left_s and math.isfinite(wait_s):
            raise Overloaded(
                f"{self._name} is overloaded: the waiting requests take about {wait_s:.1f} s, and this request's "
                f"deadline is in {max(0.0, left_s):.1f} s; retry later, or allow more time",
                max(1.0, wait_s),
            )

    def cancel(self, item: Item) -> None:
        """Removes an item without calling its `done`. Its run continues while any other request of it is wanted."""
        if item.done is not None:
            item.done = None
            if item.is_waiting:
                self._queue.remove(item)
            else:
                self._stop_unwanted()
            item.inputs = _NOTHING
            self._check_idle()

    def retry_after_s(self) -> float:
        """Returns the seconds until the queued requests have been run, at the measured speed; at least 1."""
        wait_s = self._wait_s()
        return max(1.0, wait_s) if math.isfinite(wait_s) else 1.0

    def _wait_s(self) -> float:
        """Returns the expected seconds until the queued requests have been run; infinity if the speed is unknown."""
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
        """Refuses new requests; waiting ones are still answered. Calls `when_idle` after the last response."""
        self._is_closed = True
        if when_idle is not None:
            self._when_idle.append(when_idle)
        self._arm()  # no further request will fill a delayed batch
        self._check_idle()

    def abort(self, error: MaasError) -> None:
        """Closes the batcher and answers every waiting or running request with `error`."""
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
            if self._is_armed:  # it ran inline: the loop reads new requests before the next run
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
            # The engine starts its next run while the loop writes the responses of this one.
            self._pump()
        if outputs is None:
            if isinstance(error, EngineDied):
                self._after_death(batch)
            elif isinstance(error, RunStopped):
                # Alone, so that the slow request delays no other; the earliest deadline first.
                self._retries.extend([item] for item in sorted(_live(batch), key=lambda item: item.deadline))
            elif len(batch) == 1:
                self._answer(batch[0], None, error)
            else:
                # Halving finds one bad item among n in about 2 log2(n) runs; the others are answered in the process.
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
                self._stop_merging(f"a run of {run.num_rows} rows returned another number of rows")
                self._retries.extend([item] for item in batch)
            else:
                if self._guard is not None:
                    self._guard.left -= len(batch)
                    if self._guard.left <= 0:
                        self._guard.take(batch, outputs, self._padding)
                self._cut(batch, outputs)
        self._arm_for_more()

    def _arm_for_more(self) -> None:
        """Schedules the next run if there is any work."""
        guard = self._guard
        if (
            self._queue.num_items
            or self._retries
            or self._is_closed
            or (guard is not None and guard.sample is not None)
        ):
            self._arm()

    def _check(self, guard: Guard, now: float) -> None:
        """Repeats a request that was answered from a merged run; the engine is idle."""
        sample, guard.sample = guard.sample, None
        if sample is not None:
            inputs, num_rows = sample.feed()
            run = CheckRun(self, sample, num_rows, now)
            self._runs.append(run)
            self._runner.start(inputs, num_rows, run.finished)

    def _checked(self, run: CheckRun, outputs: Tensors | None) -> None:
        self._runs.remove(run)
        if outputs is not None and self._guard is not None:  # a failed run proves nothing
            difference = self._guard.compare(run.sample, outputs)
            if difference:
                self._stop_merging(difference)
            if self._stats is not None:
                self._stats.checked(self.problem)
        self._arm_for_more()

    def _stop_merging(self, reason: str) -> None:
        """Runs each request alone from now on: a response must not depend on concurrent requests."""
        self.problem = f"{self._name} mixes the rows of requests: {reason}; requests are no longer merged"
        log.error("%s", self.problem)
        self._can_merge = False
        self._guard = None

    def _after_death(self, batch: list[Item]) -> None:
        """Retries each request once, alone, after the process of the engine died; one that was alone was the cause."""
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
        """Answers each item with its own rows: views, split by the parsed number of rows."""
        padding = self._padding
        (first, first_array), *others = outputs.items()
        start = 0
        for item in batch:
            stop = start + item.num_rows
            done, item.done = item.done, None
            if done is not None:  # same as `_answer`, inlined for speed
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
                    log.exception("the response of %s could not be delivered", self._name)
            start = stop

    def _answer(self, item: Item, outputs: Tensors | None, error: MaasError | None) -> None:
        done, item.done = item.done, None
        if done is None:
            return
        item.inputs = _NOTHING  # the queue may keep the item itself a little longer
        try:
            done(outputs, error)
        except Exception:  # a failed callback must not lose the responses of other callers
            log.exception("the response of %s could not be delivered", self._name)

    def _expire(self, item: Item) -> None:
        waiting = len(self._queue)
        text = f"{self._name} could not answer before the request's deadline; {waiting} other requests wait"
        self._answer(item, None, DeadlineExceeded(f"{text}; allow more time or send fewer requests"))

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        when = max(when, self._swept_s + _SWEEP_EVERY_S)
        self._timer = self._loop.call_at(when, self._sweep) if math.isfinite(when) else None

    def _sweep(self) -> None:
        """Answers expired requests, also while the engine is busy or stuck, and stops runs nobody waits for."""
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
        """Stops runs whose requests have all left, and overdue runs that made a request late."""
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
        """Returns the items that are running, or wait to be run again."""
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
    """Returns the form that `put` stored in the key."""
    form: Form = key[0]  # type: ignore[assignment]
    return form


def _live(items: list[Item]) -> list[Item]:
    return [item for item in items if item.done is not None]
