"""The number of workers that a cluster can run now, without draining nodes. Independent of ray.train."""

from collections.abc import Mapping, Sequence

from maas_ray.cluster.capacity.preflight import count_workers
from maas_ray.ray_internals.nodes import draining_nodes, free_resources


def find_room(needed: Mapping[str, float], held: Mapping[str, int], limit: int, together: int = 1) -> int:
    """Number of workers, at most `limit`, that fit now on nodes that are not draining.

    Args:
        needed: resources of one worker, by Ray's names.
        held: number of current workers on each node, which new ones would replace; lost nodes are ignored.
        limit: largest number to count.
        together: number of workers that must share a node because they share each matrix product.
    """
    going = draining_nodes()
    free = [
        {name: has.get(name, 0.0) + held.get(node, 0) * amount for name, amount in needed.items()}
        for node, has in free_resources().items()
        if node not in going
    ]
    return min(limit, sum(count_workers([node], needed, limit) // together * together for node in free))


def round_down(room: int, sizes: Sequence[int]) -> int:
    """The largest of `sizes` that is at most `room`; 0 if none is."""
    return max((size for size in sizes if size <= room), default=0)
