"""How all ranks leave after the same step: the registry that they report to, and the thread that reports."""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from maas_ray.errors import RanksMissing
from maas_ray.train.ranks import heartbeat
from maas_ray.train.ranks.heartbeat import Pace
from maas_ray.train.ranks.rank_registry import Directive, Heartbeat, RankRegistry


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _agree(seed: int, choose: Callable[[RankRegistry, list[Heartbeat]], int | None]) -> None:
    """Plays ranks that train, report and hear in any order; fails if one passes the step at which all are to leave."""
    dice = random.Random(seed)
    world = dice.randint(1, 5)
    registry = RankRegistry()
    attempt = registry.begin(["somewhere"] * world)
    done, limits, stops = [dice.randint(0, 30) for _ in range(world)], [None] * world, [None] * world
    asked_after = dice.randint(0, 40)
    heartbeats: list[Heartbeat] = []
    for turn in range(4000):
        if turn == asked_after:
            registry.ask("a planted reason")
        rank = dice.randrange(world)
        if dice.random() < 0.6 and done[rank] not in (stops[rank], limits[rank] if stops[rank] is None else None):
            done[rank] += 1
        else:
            heartbeat = Heartbeat(attempt, rank, done=done[rank], limit=limits[rank])
            heartbeats.append(heartbeat)
            directive = registry.heartbeat(heartbeat)
            stops[rank] = choose(registry, heartbeats) if directive.is_asked else None
            if directive.is_asked and limits[rank] is None:
                limits[rank] = done[rank] + dice.randint(1, 9)
        assert stops[rank] is None or done[rank] <= stops[rank], "a rank is beyond the step at which it was to leave"
        if all(stop is not None for stop in stops) and done == stops:
            assert len(set(done)) == 1
            return
    raise AssertionError("the ranks never left")


def _as_built(registry: RankRegistry, heartbeats: list[Heartbeat]) -> int | None:
    return registry.heartbeat(heartbeats[-1]).stop_at


@pytest.mark.parametrize("seed", range(200))
def test_all_ranks_leave_after_the_same_step_in_whatever_order_they_train_and_hear(seed: int) -> None:
    _agree(seed, _as_built)


def test_a_step_that_is_chosen_from_what_is_known_now_is_caught() -> None:
    def hasty(registry: RankRegistry, heartbeats: list[Heartbeat]) -> int | None:
        return max(heartbeat.done for heartbeat in heartbeats if heartbeat.done is not None) + 3

    caught = 0
    for seed in range(40):
        try:
            _agree(seed, hasty)
        except AssertionError:
            caught += 1
    assert caught > 20


def test_a_rank_of_an_ended_attempt_gets_no_instructions() -> None:
    registry = RankRegistry()
    first = registry.begin(["a"])
    registry.end("lost")
    second = registry.begin(["a"])
    registry.ask("growth")
    assert registry.heartbeat(Heartbeat(first, 0, done=3)) == Directive()
    assert registry.heartbeat(Heartbeat(second, 0, done=3)) == Directive(is_asked=True)


def test_what_is_asked_of_one_attempt_is_forgotten_with_it_unless_it_is_final() -> None:
    registry = RankRegistry()
    registry.begin(["a"])
    registry.ask("node is drained")
    registry.end("rank 0 died")
    assert registry.asked is None
    registry.ask("SIGTERM", is_final=True)
    attempt = registry.begin(["a"])
    assert registry.heartbeat(Heartbeat(attempt, 0, done=0)).is_asked
    assert (registry.asked, registry.final) == ("SIGTERM", "SIGTERM")


def test_silent_ranks_are_named_with_their_place_and_step() -> None:
    clock = _Clock()
    registry = RankRegistry(clock)
    attempt = registry.begin(["process 11 on a", "process 12 on b", "process 13 on c"])
    registry.heartbeat(Heartbeat(attempt, 1, done=7))
    clock.now = 20.0
    registry.heartbeat(Heartbeat(attempt, 0, done=8, has_ended=True))
    clock.now = 31.0
    assert registry.silent(30.0, 30.0) == {
        1: "no heartbeat for 31 s; process 12 on b, after step 7",
        2: "no heartbeat for 31 s; process 13 on c, no heartbeat yet",
    }
    assert 2 not in registry.silent(30.0, 60.0), "before its first heartbeat a rank has more time"
    clock.now = 90.0
    assert 0 not in registry.silent(30.0, 60.0), "a rank that has ended has nothing more to say"


def test_the_time_that_ranks_take_to_join_does_not_count_as_silence() -> None:
    clock = _Clock()
    registry = RankRegistry(clock)
    registry.begin(["process 11 on a", "process 12 on b"])
    clock.now = 59.0
    registry.joined()
    clock.now = 70.0
    assert registry.silent(30.0, 60.0) == {}
    clock.now = 120.0
    assert set(registry.silent(30.0, 60.0)) == {0, 1}


def test_an_ended_attempt_reports_its_last_step() -> None:
    registry = RankRegistry()
    attempt = registry.begin(["a", "b"])
    registry.heartbeat(Heartbeat(attempt, 0, first_step=10, done=17, committed=16))
    registry.heartbeat(Heartbeat(attempt, 1, first_step=10, done=18))
    registry.end("rank 1 died")
    (over,) = registry.past
    assert (over.workers, over.first_step, over.reached, over.committed) == (2, 10, 18, 16)
    assert registry.committed == 16


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "QUICK_S", 0.005)
    return


@pytest.mark.usefixtures("quick")
def test_threads_that_train_at_different_speeds_leave_after_the_same_step() -> None:
    registry = RankRegistry()
    attempt = registry.begin(["a", "b", "c"])
    left: dict[int, int] = {}

    def train(rank: int) -> None:
        pace = Pace(registry.heartbeat, attempt, rank, patience_s=20)
        pace.begin(0)
        for done in range(1, 100_000):
            time.sleep(0.0005 * (rank + 1))
            if pace.is_stop(done):
                left[rank] = done
                break
        pace.close(has_left=True)

    ranks = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    time.sleep(0.1)
    assert not left
    registry.ask("a planted reason")
    for rank in ranks:
        rank.join(timeout=20)
    assert len(left) == 3
    assert len(set(left.values())) == 1
    assert registry.has_left


@pytest.mark.usefixtures("quick")
def test_a_rank_waits_no_longer_than_it_may_for_others_that_never_promise() -> None:
    registry = RankRegistry()
    attempt = registry.begin(["a", "b"])
    registry.ask("a planted reason")
    pace = Pace(registry.heartbeat, attempt, 0, patience_s=0.2)
    pace.begin(0)
    with pytest.raises(RanksMissing, match="rank 0 waited 0.2 s"):
        for done in range(1, 100_000):
            pace.is_stop(done)
            time.sleep(0.001)
    pace.close()


@pytest.mark.usefixtures("quick")
def test_a_notice_to_one_process_reaches_all() -> None:
    registry = RankRegistry()
    attempt = registry.begin(["a", "b"])
    pace = Pace(registry.heartbeat, attempt, 1, notice=lambda: "received SIGTERM")
    deadline = time.monotonic() + 20
    while registry.asked is None and time.monotonic() < deadline:
        time.sleep(0.005)
    pace.close()
    assert registry.asked == "rank 1 received SIGTERM"
