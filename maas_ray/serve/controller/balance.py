"""Arithmetic of an even spread: which node is next, and how many replicas would have to move. Knows no Ray."""

from collections.abc import Callable, Mapping


def emptiest(held: Mapping[str, int], busy: Mapping[str, int], fits: Callable[[str], bool]) -> str | None:
    """The node that gets the next replica; None where it fits on none.

    Args:
        held: replicas of the pool on each node that may have some.
        busy: replicas of all pools on each node, which decide between equals.
        fits: whether a node has room for one more.
    """
    in_order = sorted(held, key=lambda node: (held[node], busy.get(node, 0), node))
    return next(filter(fits, in_order), None)  # to see whether it fits takes longest, and the first one mostly does


def num_moves(held: Mapping[str, int], room: Mapping[str, int]) -> int:
    """Replicas that have to move until no node has two more than another one that has room.

    Args:
        held: replicas of the pool on each node that may have some.
        room: how many more fit on each node now.
    """
    counts, left = dict(held), dict(room)
    moves = 0
    while counts:
        low = min((node for node in counts if left.get(node, 0) > 0), key=lambda node: counts[node], default=None)
        high = max(counts, key=lambda node: counts[node])
        if low is None or counts[high] - counts[low] <= 1:
            break
        counts[high] -= 1
        counts[low] += 1
        left[low] -= 1
        moves += 1
    return moves


def fullest(held: Mapping[str, int], head: str, busy: Mapping[str, int]) -> str:
    """The node that loses a replica first: the one with most of the pool, the head last, then the least busy one."""
    return max(held, key=lambda node: (held[node], node != head, -busy.get(node, 0)))
