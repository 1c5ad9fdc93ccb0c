"""How many workers a cluster has room for at this moment, and which of its nodes are about to go. Knows no ray.train."""

from collections.abc import Mapping, Sequence

from maas_ray.cluster.capacity.preflight import count_workers
from maas_ray.ray_internals.nodes import draining_nodes, free_resources


def find_room(needed: Mapping[str, float], held: Mapping[str, int], limit: int, together: int = 1) -> int:
    """How many workers would fit now on nodes that stay, counted up to `limit`.

    Args:
        needed: what each worker takes, by Ray's names.
        held: how many workers each node has that would make room for new ones; nodes that are gone do not count.
        limit: most that are of interest.
        together: workers that have to be on one node: those that share each matrix product.
    """
    going = draining_nodes()
    free = [
        {name: has.get(name, 0.0) + held.get(node, 0) * amount for name, amount in needed.items()}
        for node, has in free_resources().items()
        if node not in going
    ]
    return min(limit, sum(count_workers([node], needed, limit) // together * together for node in free))


def round_down(room: int, sizes: Sequence[int]) -> int:
    """The largest of `sizes` that there is room for; 0 if there is none."""
    return max((size for size in sizes if size <= room), default=0)
