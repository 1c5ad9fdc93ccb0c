"""Batcher compared with its simplest model: a list, scanned from start to end. hypothesis generates the schedules."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.item import Item, Tensors
from maas_ray.serve.batching.merger import Merger
from maas_ray.serve.batching.queueing.request_queue import Queue
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget
from tests.support.rig import HeldEngine, ManualLoop

SETTINGS = settings(
    max_examples=30,
    stateful_step_count=50,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TENANTS = ("a", "b", "c")
MAX_WAITING = 12


@dataclass(eq=False)
class Sent:
    """The model's state of a request; its rows are marked with its number."""

    number: int
    tenant: str
    priority: int
    deadline: float
    num_rows: int
    width: int
    is_poison: bool
    item: Item | None = None
    state: str = "waits"
    answers: list[Any] = field(default_factory=list)

    @property
    def rank(self) -> tuple[float, float, int]:
        return (self.priority or math.inf, self.deadline, self.number)


class Schedules(RuleBasedStateMachine):
    """Sends, cancels, turns of the loop, ends of runs and time in any order."""

    estimate_s = 0.0

    @initialize(
        max_rows=st.integers(1, 8),
        instances=st.integers(1, 2),
        can_merge=st.booleans(),
        delay_ms=st.sampled_from([0, 0, 50]),
    )
    def start(self, max_rows: int, instances: int, can_merge: bool, delay_ms: float) -> None:
        self.sent: list[Sent] = []
        self.max_rows, self.can_merge, self.delay_ms = max_rows, can_merge, delay_ms
        self.loop = ManualLoop()
        self.engine = CheckedEngine(self, instances)
        self.budget = ByteBudget(10_000)
        spec = BatchSpec(max_batch_size=max_rows, max_queued_requests=MAX_WAITING, max_delay_ms=delay_ms)
        self.batcher = Batcher(self.engine, spec, self.loop, can_merge=can_merge, budget=self.budget)

    def waiting(self) -> list[Sent]:
        return [sent for sent in self.sent if sent.state == "waits"]

    @rule(
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from([0, 0, 1, 2]),
        timeout_s=st.sampled_from([30.0, 30.0, 5.0, 0.3]),
        num_rows=st.integers(1, 5),
        width=st.sampled_from([1, 1, 2]),
        is_poison=st.sampled_from([False, False, False, False, True]),
    )
    def send(self, tenant: str, priority: int, timeout_s: float, num_rows: int, width: int, is_poison: bool) -> None:
        sent = Sent(len(self.sent), tenant, priority, self.loop.now + timeout_s, num_rows, width, is_poison)
        marks = np.full((num_rows, width), sent.number + 1, np.float32)
        if is_poison:
            marks = -marks

        def done(outputs: Tensors | None, error: MaasError | None) -> None:
            sent.answers.append(error if outputs is None else outputs["y"])
            sent.state = "answered"

        num_waiting, self.sent = len(self.waiting()), [*self.sent, sent]
        try:
            sent.item = self.batcher.submit(
                {"x": marks}, num_rows, 10, sent.deadline, done, tenant=tenant, priority=priority
            )
        except Overloaded:
            assert num_waiting == MAX_WAITING
            self.sent.pop()

    @rule(which=st.integers(0, 1000))
    def cancel(self, which: int) -> None:
        if self.sent:
            sent = self.sent[which % len(self.sent)]
            assert sent.item is not None
            self.batcher.cancel(sent.item)
            if sent.state != "answered":
                sent.state = "cancelled"

    @rule(seconds=st.sampled_from([0.02, 0.2, 3.0]))
    def wait(self, seconds: float) -> None:
        self.loop.advance(seconds)
        for sent in self.waiting():
            assert sent.deadline > self.loop.now - 0.006, "answered at its deadline, give or take a sweep"

    @rule()
    def turn(self) -> None:
        self.loop.turn()
        if not self.delay_ms and len(self.engine.runs_going_on) < self.engine.instances:
            assert not self.waiting(), "no request waits while the engine is free"

    @precondition(lambda self: self.engine.is_busy)
    @rule()
    def end_run(self) -> None:
        self.engine.end_run()

    @invariant()
    def counts_are_those_of_the_model(self) -> None:
        if hasattr(self, "batcher"):
            num_waiting = len(self.waiting())
            assert self.batcher.num_queued == num_waiting <= MAX_WAITING
            assert self.budget.used == 10 * num_waiting
            assert self.batcher.is_behind == (sum(sent.num_rows for sent in self.waiting()) > self.max_rows)
            assert len(self.engine.runs_going_on) <= self.engine.instances

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        closed: list[bool] = []
        self.batcher.close(when_idle=lambda: closed.append(True))
        for _ in range(500):
            self.loop.turn()
            if self.engine.is_busy:
                self.engine.end_run()
        assert closed == [True]
        assert self.budget.used == 0
        for sent in self.sent:
            self.check_answer(sent)

    def check_answer(self, sent: Sent) -> None:
        if sent.state == "cancelled":
            assert sent.answers == []
            return
        assert len(sent.answers) == 1, "exactly once"
        (answer,) = sent.answers
        if isinstance(answer, BadRequest):
            assert sent.is_poison
        elif isinstance(answer, DeadlineExceeded):
            assert sent.deadline <= self.loop.now
        elif isinstance(answer, Overloaded):
            assert "took the place" in str(answer)
        else:
            np.testing.assert_array_equal(answer, np.full((sent.num_rows, sent.width), 2.0 * (sent.number + 1)))


class CheckedEngine(HeldEngine):
    """Compares each run with the requests that the model allows in it."""

    def __init__(self, machine: Schedules, instances: int) -> None:
        super().__init__(instances)
        self.machine = machine
        self.runs_going_on: list[list[Sent]] = []

    def estimate_s(self, num_rows: int, form: object = ()) -> float:
        return self.machine.estimate_s * num_rows

    def start(self, inputs: Tensors, num_rows: int, finished: Any) -> None:
        machine = self.machine
        numbers = [int(abs(mark)) - 1 for mark in inputs["x"][:, 0]]  # type: ignore[index]
        batch = [machine.sent[number] for number in dict.fromkeys(numbers)]
        assert numbers == [sent.number for sent in batch for _ in range(sent.num_rows)], "whole, in one piece each"
        assert len(batch) == 1 or (machine.can_merge and num_rows <= machine.max_rows)
        assert {sent.width for sent in batch} == {inputs["x"].shape[1]}
        is_retry = any(sent.state != "waits" for sent in batch)
        for sent in batch:
            assert sent.state in ("ran", "waits"), "neither answered nor cancelled before"
            assert sent.deadline > machine.loop.now
        if not is_retry:
            self.check_order(batch, num_rows)
        for sent in batch:
            sent.state = "ran"
        self.runs_going_on.append(batch)

        def ended(outputs: Tensors | None, error: MaasError | None) -> None:
            self.runs_going_on.remove(batch)
            finished(outputs, error)

        super().start(inputs, num_rows, ended)

    def check_order(self, batch: list[Sent], num_rows: int) -> None:
        machine = self.machine
        for tenant in {sent.tenant for sent in batch}:
            taken = [sent for sent in batch if sent.tenant == tenant]
            assert taken == sorted(taken, key=lambda sent: sent.rank), "a tenant's rows are in its order"
            if machine.estimate_s:
                continue  # deadlines are near: some stay behind
            left = [s for s in machine.waiting() if s.tenant == tenant and s.width == batch[0].width and s not in batch]
            assert all(s.rank > taken[-1].rank for s in left), "no request of the same tenant and size was passed over"
        if machine.can_merge and not machine.estimate_s:
            first = [
                min((s for s in machine.waiting() if s not in batch and s.tenant == t and s.width == batch[0].width),
                    key=lambda s: s.rank, default=None)
                for t in TENANTS
            ]  # fmt: skip
            left = [sent for sent in first if sent is not None]
            expired = any(sent.deadline <= machine.loop.now for sent in machine.sent)
            assert not left or expired or any(num_rows + s.num_rows > machine.max_rows for s in left), "as many as fit"
        if machine.estimate_s and len(batch) > 1:
            end = machine.loop.now + machine.estimate_s * num_rows
            on_time = [sent for sent in batch if machine.loop.now + machine.estimate_s * sent.num_rows <= sent.deadline]
            assert not on_time or all(sent.deadline >= end for sent in batch), "no request is made late by others"


def test_every_schedule_keeps_order_bounds_and_answers() -> None:
    run_state_machine_as_test(Schedules, settings=SETTINGS)


def test_no_schedule_with_near_deadlines_makes_a_request_late() -> None:
    class Near(Schedules):
        estimate_s = 0.05

    run_state_machine_as_test(Near, settings=SETTINGS)


def _skip_a_deadline(patch: pytest.MonkeyPatch) -> None:
    take = Queue.take

    def last_first(self: Queue, *args: Any, **options: Any) -> list[Item]:
        return take(self, *args, **options)[::-1]

    patch.setattr(Queue, "take", last_first)


def _lose_a_refund(patch: pytest.MonkeyPatch) -> None:
    remove = Queue.remove

    def forgetful(self: Queue, item: Item) -> None:
        item.num_bytes, num_bytes = 0, item.num_bytes
        remove(self, item)
        item.num_bytes = num_bytes

    patch.setattr(Queue, "remove", forgetful)


def _cut_one_row_late(patch: pytest.MonkeyPatch) -> None:
    split = Merger.split

    def shifted(self: Merger, batch: list[Item], num_rows: int, outputs: Tensors) -> bool:
        return split(self, batch, num_rows, {name: np.roll(array, -1, 0) for name, array in outputs.items()})

    patch.setattr(Merger, "split", shifted)


def _answer_twice(patch: pytest.MonkeyPatch) -> None:
    deliver = Item.deliver

    def twice(self: Item, outputs: Tensors | None, error: MaasError | None, sender: str) -> None:
        done = self.done
        deliver(self, outputs, error, sender)
        if done is not None:
            done(outputs, error)

    patch.setattr(Item, "deliver", twice)


@pytest.mark.parametrize("fault", [_skip_a_deadline, _lose_a_refund, _cut_one_row_late, _answer_twice])
def test_a_planted_fault_is_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends at the first schedule that shows it; which one that is differs between releases of hypothesis."""
    fault(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(Schedules, settings=settings(SETTINGS, phases=[Phase.generate], max_examples=2000))
