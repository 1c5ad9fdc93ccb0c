"""Dynamic batcher: merges the rows of waiting requests into runs. Independent of HTTP, model files and Ray.

A batch is closed when the engine is free: a lone request on an idle model does not wait (unless `max_delay_ms` is set),
and while the engine is busy, requests accumulate. A batcher belongs to one model version, so versions never share a
run. The loop and the runner are passed in. The path of a request:

    put         limits, deadline, quarantine (batcher.py); what it may share a run with (merger.py)
    wait        tenants, priorities, deadlines (queueing/); expiry.py answers it if it waits too long
    run         with others, as soon as the engine is free (dispatcher.py); on the loop or in a thread (runner.py)
    deliver     its own rows (merger.py), or its own failure (failed_runs.py)
"""

from collections.abc import Callable

from maas_ray.bundle.engine.padding import Padding
from maas_ray.errors import DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.batching.admission import Admission
from maas_ray.serve.batching.dispatcher import Dispatcher
from maas_ray.serve.batching.expiry import Expiry
from maas_ray.serve.batching.failed_runs import FailedRuns
from maas_ray.serve.batching.item import NOTHING, Done, Item, Tensors, live
from maas_ray.serve.batching.merge_guard import Guard
from maas_ray.serve.batching.merger import Merger
from maas_ray.serve.batching.ongoing import Ongoing
from maas_ray.serve.batching.protocols import Loop, Runner, RunStats
from maas_ray.serve.batching.quarantine import Quarantine
from maas_ray.serve.batching.queueing.load_shedding import LoadShedding
from maas_ray.serve.batching.queueing.request_queue import DEFAULT_TENANT, Queue
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget


class Batcher:
    """Queue and runs of one model version: accepts, cancels and answers requests, until it is closed.

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
        problem: why requests do not share runs although the graph permits it, if that is known already.
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
        problem: str = "",
    ) -> None:
        self._loop = loop
        self._name = name
        self._when_idle: list[Callable[[], None]] = []
        guard = Guard(spec.check_share) if spec.check_share else None
        self._merger = merger = Merger(
            can_merge=can_merge and not problem,
            padding=padding,
            optional=optional,
            form_of=runner.form_of,
            guard=guard,
            name=name,
            problem=problem,
        )
        self._queue = queue = Queue(
            spec,
            budget or ByteBudget(spec.max_queued_bytes),
            runner.estimate_s
            if runner.form_of is None
            else lambda num_rows, key: runner.estimate_s(num_rows, merger.form(key)),
            LoadShedding(
                spec.max_queued_requests,
                name,
                drop=lambda item, error: item.deliver(None, error, name),
                retry_after_s=lambda: self._admission.retry_after_s(),
            ),
        )
        self._admission = Admission(queue, merger, runner, loop, name)
        self._quarantine = Quarantine()
        self._ongoing = ongoing = Ongoing(runner, loop)
        self._runs = ongoing.runs
        self._expiry = Expiry(queue, ongoing, loop, name, self._check_idle)
        self._dispatcher = Dispatcher(
            runner,
            loop,
            queue,
            ongoing,
            merger,
            FailedRuns(ongoing, self._quarantine, name),
            self._expiry,
            is_delayed=spec.max_delay_ms > 0,
            stats=stats,
            name=name,
            check_idle=self._check_idle,
        )

    @property
    def max_batch_size(self) -> int:
        """Maximum rows of one run."""
        return self._queue.max_rows

    def resize(self, max_batch_size: int) -> None:
        """Changes the maximum rows of one run, effective with the next run."""
        self._queue.max_rows = max_batch_size

    @property
    def problem(self) -> str:
        """Why requests no longer share runs; empty if they do, or never did."""
        return self._merger.problem

    @property
    def num_queued(self) -> int:
        """Number of requests that wait for a run."""
        return len(self._queue)

    @property
    def num_ongoing(self) -> int:
        """Number of waiting and running requests that have not been answered or cancelled."""
        return len(self._queue) + len(live(self._ongoing.items))

    @property
    def busy_s(self) -> float:
        """Seconds since the oldest current run started; 0 while the engine is idle."""
        return self._ongoing.busy_s

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused."""
        return self._dispatcher.is_closed

    @property
    def is_behind(self) -> bool:
        """Whether more rows are waiting than one run can take."""
        return self._queue.num_rows > self._queue.max_rows

    def admit(self, deadline: float) -> None:
        """Refuses a request that could not be answered in time, before it is parsed: an early refusal helps the client.

        Only for requests without a priority that must wait for more than one full run (`is_behind`). Nothing is refused
        while several tenants have requests waiting: those are not run in order of arrival.

        Args:
            deadline: time on the loop's clock after which the response is not wanted.

        Raises:
            Overloaded: the waiting requests take nearly as long as this request may wait.
        """
        if self.is_behind and self._queue.num_tenants <= 1:
            self._admission.check(deadline)

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
        dispatcher, deadline = self._dispatcher, item.deadline
        if dispatcher.is_closed:
            raise Overloaded(f"{self._name} is being unloaded; send the request again", 1.0)
        now = self._loop.time()
        if deadline <= now:
            raise DeadlineExceeded(f"the deadline passed before the request to {self._name} could be queued")
        if self._quarantine.is_active:
            self._quarantine.check(item.inputs, now, self._name)
        self._queue.put(item, self._merger.key(item), tenant, now)
        if deadline < self._expiry.earliest:
            self._expiry.watch(deadline)
        if not dispatcher.is_armed and len(self._runs) < dispatcher.instances:  # no call while the engine is busy
            dispatcher.arm()

    def cancel(self, item: Item) -> None:
        """Removes an item without calling its `done`. Its run continues while any other request of it is wanted."""
        if item.done is not None:
            item.done = None
            if item.is_waiting:
                self._queue.remove(item)
            else:
                self._ongoing.stop_unwanted()
            item.inputs = NOTHING
            self._check_idle()

    def close(self, when_idle: Callable[[], None] | None = None) -> None:
        """Refuses new requests; waiting ones are still answered. Calls `when_idle` after the last response."""
        self._dispatcher.is_closed = True
        if when_idle is not None:
            self._when_idle.append(when_idle)
        self._dispatcher.arm()  # no further request will fill a delayed batch
        self._check_idle()

    def abort(self, error: MaasError) -> None:
        """Closes the batcher and answers every waiting or running request with `error`."""
        self._dispatcher.is_closed = True
        waiting = list(self._queue)
        for item in waiting:
            self._queue.remove(item)
        for item in [*waiting, *self._ongoing.items]:
            item.deliver(None, error, self._name)
        self._ongoing.retries.clear()
        self._ongoing.stop_unwanted()
        self._check_idle()

    def _check_idle(self) -> None:
        """Ends a closed batcher once nothing waits and nothing runs."""
        if self.is_closed and not self._queue and not self._ongoing.retries and not self._runs:
            self._expiry.stop()
            self._dispatcher.stop_waiting()
            callbacks, self._when_idle = self._when_idle, []
            for callback in callbacks:
                callback()
