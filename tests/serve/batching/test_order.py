"""Requests of the next run: priorities and deadlines, tenant shares, runs that end in time, delay, instances."""

import gc
import random
from collections.abc import Sequence

import pytest

from maas_ray.errors import DeadlineExceeded, Overloaded
from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.queueing.fairness import Shares
from maas_ray.serve.batching.queueing.load_shedding import LoadShedding
from maas_ray.serve.batching.queueing.priority_heap import PriorityHeap
from maas_ray.serve.batching.queueing.request_queue import Queue
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget
from tests.support.rig import Rig


def hold(rig: Rig) -> None:
    """Keeps the engine busy, so that the next requests wait together."""
    rig.send("held", 0)
    rig.loop.turn()


def test_the_earliest_deadline_runs_first_and_priorities_before_it() -> None:
    rig = Rig(max_batch_size=1)
    hold(rig)
    rig.send("late", 1, timeout_s=30)
    rig.send("early", 2, timeout_s=20)
    rig.send("as early", 3, timeout_s=20)
    rig.send("second", 4, timeout_s=40, priority=2)
    rig.send("first", 5, timeout_s=50, priority=1)
    rig.finish_all()
    assert rig.engine.runs[1:] == [[5.0], [4.0], [2.0], [3.0], [1.0]], "priority 0 is the lowest"


def test_a_priority_counts_for_nothing_against_other_tenants() -> None:
    rig = Rig(max_batch_size=1)
    hold(rig)
    for number in range(1, 4):
        rig.send(f"loud {number}", number, tenant="loud", priority=1)
        rig.send(f"calm {number}", number + 10, tenant="calm")
    rig.finish_all()
    assert rig.engine.runs[1:] == [[1.0], [11.0], [2.0], [12.0], [3.0], [13.0]]


def test_a_flood_of_one_tenant_delays_another_by_one_run() -> None:
    rig = Rig(max_batch_size=4, max_queued_requests=600)
    for number in range(500):
        rig.send(f"flood {number}", number, tenant="flood")
    rig.loop.turn()
    rig.send("calm", 1000, tenant="calm")
    rig.finish_all()
    assert 1000.0 in rig.engine.runs[1], "the run in progress when it arrived, then its own"


@pytest.mark.parametrize("can_merge", [True, False])
def test_tenants_share_rows_by_their_weights(can_merge: bool) -> None:
    dice = random.Random(3)
    weights = {"a": 3.0, "b": 1.5}
    spec = BatchSpec(max_batch_size=8, max_queued_requests=3000)
    shedding = LoadShedding(spec.max_queued_requests, "model", lambda item, error: None, lambda: 1.0)
    queue = Queue(spec, ByteBudget(100_000), lambda num_rows, key: 0.0, shedding, weights)
    names: dict[Item, str] = {}
    for _ in range(900):
        item = Item({}, dice.randint(1, 3), 10, dice.uniform(50, 99), lambda outputs, error: None)
        names[item] = dice.choice("abc")
        queue.put(item, (), names[item], 0.0)
    rows = dict.fromkeys("abc", 0)
    for _ in range(60 if can_merge else 200):
        for item in queue.take(can_merge, 0.0):
            rows[names[item]] += item.num_rows
        had = [num_rows / weights.get(name, 1.0) for name, num_rows in rows.items()]
        assert max(had) - min(had) <= 2 * 3, "of items of at most 3 rows, no tenant is ahead by more than two"
    assert min(rows.values()) > 0


def test_a_pause_saves_nothing_up() -> None:
    rig = Rig(max_batch_size=1, max_queued_requests=600, seconds=lambda n: 0.0)
    for number in range(100):
        rig.send(f"busy {number}", 1, tenant="busy")
    for _ in range(50):
        rig.loop.turn()
        rig.engine.end_run()
    for number in range(20):
        rig.send(f"back {number}", 2, tenant="back")
    for _ in range(20):
        rig.loop.turn()
        rig.engine.end_run()
    assert rig.engine.runs[50:].count([2.0]) in (10, 11), "half of what ran since, not all of it"


def test_a_full_queue_drops_items_for_a_tenant_below_its_share() -> None:
    budget = ByteBudget(10_000)
    rig = Rig(max_queued_requests=10, budget=budget)
    hold(rig)
    for number in range(10):
        rig.send(f"flood {number}", number, tenant="flood")
    for number in range(5):
        rig.send(f"calm {number}", number, tenant="calm")
    with pytest.raises(Overloaded, match="10 requests wait"):
        rig.send("calm too many", 9, tenant="calm")
    with pytest.raises(Overloaded, match="10 requests wait"):
        rig.send("flood too many", 9, tenant="flood")
    displaced = [name for name, answer in rig.answers.items() if isinstance(answer, Overloaded)]
    assert displaced == [f"flood {number}" for number in (9, 8, 7, 6, 5)], "the last of those who have most"
    assert "mostly with your requests" in str(rig.answers["flood 9"])
    assert rig.batcher.num_queued == 10
    assert budget.used == 100
    rig.finish_all()
    assert budget.used == 0
    assert len(rig.answers) == 16


def test_items_are_dropped_for_bytes_too_but_only_if_enough_become_free() -> None:
    budget = ByteBudget(100)
    rig = Rig(budget=budget)
    hold(rig)
    for number in range(3):
        rig.send(f"flood {number}", number, tenant="flood", num_bytes=30)
    rig.send("calm", 9, tenant="calm", num_bytes=35)
    assert isinstance(rig.answers["flood 2"], Overloaded)
    assert budget.used == 95
    with pytest.raises(Overloaded, match="95 bytes wait, this request has 80"):
        rig.send("too large", 9, tenant="third", num_bytes=80)
    assert budget.used == 95
    assert "flood 1" not in rig.answers


def affine(num_rows: int) -> float:
    """5 s and 1 s a row."""
    return 5.0 + num_rows


def test_a_run_takes_no_more_rows_than_end_before_its_earliest_deadline() -> None:
    rig = Rig(max_batch_size=64, seconds=affine)
    hold(rig)
    rig.send("tight", 1, timeout_s=20)
    for number in range(40):
        rig.send(str(number), number, timeout_s=500)
    rig.finish_all()
    assert rig.engine.runs[1][0] == 1.0
    assert len(rig.engine.runs[1]) == 11, "1.25 times (5 s + 11 s) are 20 s"
    assert len(rig.engine.runs[2]) == 30, "the rest has time"


def test_an_estimate_alone_refuses_no_request() -> None:
    rig = Rig(seconds=lambda num_rows: 1000.0)
    rig.send("hopeless", 1, timeout_s=2)
    rig.finish_all()
    assert rig.answers == {"hopeless": [2.0]}


def test_a_request_that_would_be_late_even_alone_delays_no_other() -> None:
    rig = Rig(max_batch_size=8, seconds=affine)
    hold(rig)
    rig.send("hopeless", 1, timeout_s=5)
    for number in range(8):
        rig.send(str(number), number + 10, timeout_s=100)
    rig.engine.end_run()
    rig.loop.turn()
    assert len(rig.engine.runs[1]) == 8, "a full run of the others"
    assert 1.0 not in rig.engine.runs[1]
    assert "hopeless" not in rig.answers, "it waits: the prediction may be wrong"
    rig.loop.advance(6)
    assert isinstance(rig.answers["hopeless"], DeadlineExceeded)


def test_more_than_can_be_done_does_not_end_in_small_runs() -> None:
    """At twice the capacity the head of the queue is always about to expire; runs of one row would lose nearly all."""
    rig = Rig(max_batch_size=16, max_queued_requests=5000, seconds=affine)
    full_rate = 16 / (1.25 * affine(16))
    sent, since = 0, rig.loop.now
    for _ in range(150):
        while sent < 2 * full_rate * (rig.loop.now - since) or sent == 0:
            rig.send(str(sent), sent, timeout_s=60)
            sent += 1
        rig.loop.turn()
        rig.loop.advance(affine(len(rig.engine.runs[-1])))
        rig.engine.end_run()
    good = sum(isinstance(answer, list) for answer in rig.answers.values())
    assert good / (rig.loop.now - since) >= 0.9 * full_rate
    assert all(len(run) >= 12 for run in rig.engine.runs[20:])


def test_a_tenant_that_asks_too_much_does_not_cost_another_its_deadlines() -> None:
    rig = Rig(max_batch_size=16, max_queued_requests=5000, seconds=affine)
    sent, since = 0, rig.loop.now
    for turn in range(100):
        while sent < 3 * 16 / affine(16) * (rig.loop.now - since) or sent == 0:
            rig.send(f"greedy {sent}", sent, timeout_s=80, tenant="greedy")
            sent += 1
        rig.send(f"calm {turn}", turn, timeout_s=80, tenant="calm")
        rig.loop.turn()
        rig.loop.advance(affine(len(rig.engine.runs[-1])))
        rig.engine.end_run()
    calm = [answer for name, answer in rig.answers.items() if name.startswith("calm")]
    assert len(calm) >= 95
    assert all(isinstance(answer, list) for answer in calm)


def test_a_delayed_batch_waits_for_its_oldest_and_no_longer() -> None:
    rig = Rig(max_delay_ms=100, seconds=lambda n: 0.01)
    rig.send("a", 1)
    rig.loop.turn()
    rig.loop.advance(0.06)
    rig.send("b", 2)
    rig.loop.turn()
    assert rig.engine.runs == []
    rig.loop.advance(0.041)
    rig.loop.turn()
    assert rig.engine.runs == [[1.0, 2.0]], "100 ms after the first, not after the second"


def test_a_full_batch_goes_at_once_and_its_remainder_waits() -> None:
    rig = Rig(max_delay_ms=100, seconds=lambda n: 0.01)
    for number in range(5):
        rig.send(str(number), number)
    rig.loop.turn()
    assert rig.engine.runs == [[0.0, 1.0, 2.0, 3.0]]
    rig.engine.end_run()
    rig.loop.turn()
    assert len(rig.engine.runs) == 1
    rig.loop.advance(0.1)
    rig.loop.turn()
    assert rig.engine.runs[1:] == [[4.0]]


def test_a_delay_ends_before_it_would_cost_a_deadline() -> None:
    rig = Rig(max_delay_ms=10_000, seconds=lambda n: 1.0)
    rig.send("a", 1, timeout_s=3)
    rig.loop.turn()
    rig.loop.advance(1.7)
    rig.loop.turn()
    assert rig.engine.runs == []
    rig.loop.advance(0.05)
    rig.loop.turn()
    rig.engine.end_run()
    assert rig.answers == {"a": [2.0]}


def test_closing_waits_for_no_one_to_fill_a_batch() -> None:
    rig = Rig(max_delay_ms=10_000, seconds=lambda n: 0.01)
    closed: list[bool] = []
    rig.send("a", 1)
    rig.loop.turn()
    rig.batcher.close(when_idle=lambda: closed.append(True))
    rig.finish_all()
    assert (rig.answers, closed) == ({"a": [2.0]}, [True])


def test_there_are_as_many_concurrent_runs_as_streams() -> None:
    rig = Rig(instances=2)
    for number in range(10):
        rig.send(str(number), number)
    rig.loop.turn()
    assert rig.engine.runs == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    rig.engine.end_run(1)
    rig.loop.turn()
    assert rig.engine.runs[2:] == [[8.0, 9.0]]
    rig.finish_all()
    assert rig.answers == {str(number): [2.0 * number] for number in range(10)}


def test_items_that_leave_the_queue_release_their_bytes_at_once() -> None:
    before = _num_ended_items()
    budget = ByteBudget(1000)
    rig = Rig(budget=budget)
    hold(rig)
    rig.send("stays", 1)
    for number in range(5000):
        item = rig.send(f"goes {number}", number, timeout_s=10 + number % 7)
        assert budget.used == 20
        rig.batcher.cancel(item)
        assert budget.used == 10
        assert item.inputs == {}
    assert _num_ended_items() - before < 100, "the queue keeps few of the cancelled items"
    rig.finish_all()
    assert rig.answers == {"held": [0.0], "stays": [2.0]}


def _num_ended_items() -> int:
    return sum(type(thing) is Item and thing.done is None for thing in gc.get_objects())


@pytest.mark.parametrize("seed", range(5))
def test_a_line_is_a_sorted_list(seed: int) -> None:
    dice = random.Random(seed)
    line: PriorityHeap[Item] = PriorityHeap()
    waiting: list[Item] = []
    for number in range(500):
        if waiting and dice.random() < 0.45:
            gone = line.first() if dice.random() < 0.5 else dice.choice(waiting)
            assert line.first() is min(waiting, key=lambda item: item.rank)
            gone.is_waiting = False
            line.num_waiting -= 1
            waiting.remove(gone)
        else:
            item = Item({}, 1, 1, 0.0, lambda outputs, error: None)
            item.rank = (0, number if dice.random() < 0.8 else dice.random() * number, number)
            item.is_waiting = True
            line.add(item)
            waiting.append(item)
        assert sorted(line, key=lambda item: item.rank) == sorted(waiting, key=lambda item: item.rank)
    drained = []
    for item in line.drain():
        item.is_waiting = False
        drained.append(item)
    assert drained == sorted(waiting, key=lambda item: item.rank)


def test_idle_tenants_use_no_memory() -> None:
    shares = Shares({})
    for number in range(5000):
        tenant = shares.enter(str(number))
        shares.charge(tenant, 10**6)
        tenant.had *= 2 + number  # ahead of all others
        shares.leave(tenant)
    first = shares.enter("unknown").had
    remembered = sum(shares.enter(str(number)).had > first for number in range(5000))
    assert 0 < remembered <= 1024


def test_statistics_receive_each_wait_and_each_run() -> None:
    told: list[tuple[object, ...]] = []

    class Stats:
        def waited(self, items: Sequence[Item], now_s: float) -> None:
            told.extend(("waited", now_s >= item.arrived_s, item.num_rows) for item in items)

        def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
            told.append(("ran", num_requests, num_rows))

        def checked(self, difference: str) -> None:
            told.append(("checked", difference))

    rig = Rig(stats=Stats())
    rig.send("a", 1, 2)
    rig.send("b", 3)
    rig.finish_all()
    assert told == [("waited", True, 2), ("waited", True, 1), ("ran", 2, 3)]


def test_a_request_that_would_wait_in_vain_is_refused_at_once_and_no_other() -> None:
    rig = Rig(max_batch_size=2)  # a run takes 3 s
    for number in range(9):
        rig.send(f"r{number}", float(number), timeout_s=100.0)
        rig.loop.turn()
    assert rig.batcher.num_queued == 8, "four runs, 12 s"
    now = rig.loop.now
    with pytest.raises(Overloaded, match=r"take about 12.0 s, and this request.s deadline is in 15.0 s"):
        rig.batcher.admit(now + 15.0)
    rig.batcher.admit(now + 25.0)
    while rig.batcher.is_behind:
        rig.engine.end_run()
        rig.loop.turn()
    rig.batcher.admit(now + 0.001)  # it may still make it alone
