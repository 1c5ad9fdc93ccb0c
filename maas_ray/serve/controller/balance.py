"""Even spread of replicas: selects the next node, and counts the replicas that should move. Independent of Ray."""

from collections.abc import Callable, Mapping


def emptiest(held: Mapping[str, int], busy: Mapping[str, int], fits: Callable[[str], bool]) -> str | None:
    """Returns the node for the next replica; None if it fits on none.

    Args:
        held: replicas of the pool on each eligible node.
        busy: replicas of all pools on each node, to break ties.
        fits: returns whether a node has free resources for one more.
    """
    in_order = sorted(held, key=lambda node: (held[node], busy.get(node, 0), node))
    return next(filter(fits, in_order), None)  # `fits` is the slowest part, and the first node usually fits


def num_moves(held: Mapping[str, int], room: Mapping[str, int]) -> int:
    """Returns how many replicas must move until no node has two more than another one with free resources.

    Args:
        held: replicas of the pool on each eligible node.
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
    """Returns the node to stop a replica on: most replicas of the pool, the head last, then the least busy node."""
    return max(held, key=lambda node: (held[node], node != head, -busy.get(node, 0)))
