"""Balance: the node that gets or loses a replica, the number of moves, and the start, end and abort of a move."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maas_ray.serve.controller.balance import emptiest, fullest, num_moves
from maas_ray.serve.controller.moves import BACKOFF_S, LOOK_S, SETTLE_S, START_S, Mover


@pytest.mark.parametrize(
    ("held", "busy", "fits", "node"),
    [
        ({"a": 1, "b": 0}, {}, "ab", "b"),
        ({"a": 1, "b": 0}, {}, "a", "a"),  # an emptier one without room is none
        ({"a": 1, "b": 1}, {"a": 3, "b": 2}, "ab", "b"),  # between equals the one with less of everything
        ({"a": 0}, {}, "", None),
        ({}, {}, "", None),
    ],
)
def test_the_next_replica_goes_to_the_emptiest_node_with_room(
    held: dict[str, int], busy: dict[str, int], fits: str, node: str | None
) -> None:
    assert emptiest(held, busy, fits.__contains__) == node


def test_the_fullest_node_loses_a_replica_first_and_the_head_last() -> None:
    assert fullest({"head": 1, "a": 2}, "head", {}) == "a"
    assert fullest({"head": 1, "a": 1}, "head", {}) == "a"
    assert fullest({"a": 1, "b": 1}, "head", {"a": 5, "b": 1}) == "b"  # the one that may soon be empty


@pytest.mark.parametrize(
    ("held", "room", "moves"),
    [
        ({"a": 4, "b": 0}, {"b": 9}, 2),
        ({"a": 4, "b": 0}, {"b": 1}, 1),
        ({"a": 4, "b": 0}, {}, 0),
        ({"a": 2, "b": 1}, {"b": 9}, 0),
        ({"a": 3, "b": 3, "c": 0}, {"c": 9}, 2),
        ({"a": 1}, {"a": 9}, 0),
        ({}, {}, 0),
    ],
)
def test_as_many_move_as_an_even_spread_takes(held: dict[str, int], room: dict[str, int], moves: int) -> None:
    assert num_moves(held, room) == moves


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1))
def test_after_the_moves_no_two_nodes_differ_by_more_than_one(held: dict[str, int]) -> None:
    """The new replicas start on the emptiest nodes, and as many of the fullest ones end."""
    counts = Counter(held)
    moves = num_moves(held, dict.fromkeys(held, 99))
    for _ in range(moves):
        node = emptiest(counts, {}, lambda node: True)
        assert node is not None
        counts[node] += 1
    for _ in range(moves):
        counts[fullest(counts, "", {})] -= 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert sum(counts.values()) == sum(held.values())


class Pool:
    """A pool as a `Mover` sees it, at a time that the test chooses."""

    def __init__(self) -> None:
        self.now, self.moves = 0.0, 2
        self.mover = Mover(clock=lambda: self.now)

    def rest(self, seconds: float) -> int:
        """Lets a pool rest for a while, looked at ten times a second; returns how many are to be beyond its number."""
        end = self.now + seconds
        while self.now < end and not self.mover.extra:
            self.now += 0.1
            self.mover.rest("v", lambda: self.moves)
        return self.mover.extra


def test_a_move_begins_once_the_pool_has_been_uneven_for_a_while() -> None:
    pool = Pool()
    assert pool.rest(SETTLE_S - LOOK_S) == 0
    pool.moves = 0
    pool.rest(2 * LOOK_S)  # a node that joined and left
    pool.moves = 2
    assert pool.rest(SETTLE_S - LOOK_S) == 0
    assert pool.rest(3 * LOOK_S) == 2


@pytest.mark.parametrize(
    ("version", "num_running", "seconds", "extra"),
    [("v", 5, 1, 2), ("v", 6, 1, 0), ("w", 5, 1, 0), ("v", 5, START_S + 1, 0)],
    ids=["they start", "they run", "something else is wanted", "they do not start"],
)
def test_a_move_ends_when_the_new_ones_run_or_cannot(
    version: str, num_running: int, seconds: float, extra: int
) -> None:
    pool = Pool()
    pool.rest(10)
    pool.now += seconds
    pool.mover.follow(version, num_running, 4)
    assert pool.mover.extra == extra


def test_moves_that_change_nothing_get_rarer() -> None:
    pool = Pool()
    begun = []
    for _ in range(4):
        assert pool.rest(2 * BACKOFF_S[-1]) == 2
        begun.append(pool.now)
        pool.mover.follow("v", 6, 4)
    pauses = [later - earlier for earlier, later in pairwise(begun)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > BACKOFF_S[-1]
