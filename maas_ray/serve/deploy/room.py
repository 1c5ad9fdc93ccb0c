"""Free resources on nodes: placement of replicas, replacement in steps, and texts for both. Independent of Serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maas_ray.cluster.capacity.nodes import Node
from maas_ray.serve.spec.pools import ServingSpec

_MAX_NODES_SHOWN = 8
Needs = Mapping[str, float]


def needs_of(spec: ServingSpec) -> dict[str, float]:
    """Returns the resources of one replica by Ray's names, without zeros."""
    wanted: dict[str, float] = {"CPU": spec.resources.cpus, "GPU": spec.resources.gpus}
    wanted["memory"] = float(spec.resources.memory_bytes or 0)
    if spec.placement.accelerator is not None:
        wanted[f"accelerator_type:{spec.placement.accelerator}"] = 0.001  # the amount that Ray itself requests
    return {name: amount for name, amount in wanted.items() if amount > 0}


def say_needs(needs: Needs) -> str:
    """Returns text such as `1.5 CPU, 1 GPU`."""
    said = [_say(name, amount) for name, amount in needs.items()]
    return ", ".join(said) or "nothing"


def say_free(nodes: Sequence[Node], needs: Needs) -> str:
    """Returns the free amounts of the required resources as text, node by node."""
    said = [
        f"{', '.join(_say(name, node.free.get(name, 0.0)) for name in needs)} on {node.address} (node {node.id[:6]})"
        for node in sorted(nodes, key=lambda node: -node.free.get("CPU", 0.0))
    ]
    more = [f"and {len(said) - _MAX_NODES_SHOWN} more nodes"] if len(said) > _MAX_NODES_SHOWN else []
    return "; ".join(said[:_MAX_NODES_SHOWN] + more) or "no node that the pool may use"


def _say(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / (1 << 30):.1f} GiB of memory"
    if name.startswith("accelerator_type:"):
        return f"{name.partition(':')[2]} {'available' if amount else 'not available'}"
    return f"{round(amount, 3):g} {name}"


@dataclass
class FreeResources:
    """Free resources of the nodes that a pool may use, for trial placements.

    Args:
        free: free resources by node.
        one_per_node: whether a node runs at most one replica.
        taken: nodes that run replicas of the pool, once per replica.
    """

    free: dict[str, dict[str, float]]
    one_per_node: bool = False
    taken: list[str] = field(default_factory=list)

    def copy(self) -> "FreeResources":
        """Returns an independent copy."""
        return FreeResources({node: dict(has) for node, has in self.free.items()}, self.one_per_node, list(self.taken))

    def place(self, needs: Needs, limit: int) -> int:
        """Places up to `limit` replicas, each on the node with the fewest; returns the number placed."""
        for placed in range(limit):
            fitting = [node for node in self.free if self._fits(node, needs)]
            if not fitting:
                return placed
            node = min(fitting, key=lambda node: (self.taken.count(node), node))
            self._add(node, needs, -1)
            self.taken.append(node)
        return limit

    def release(self, node: str, needs: Needs) -> None:
        """Releases the resources of a replica."""
        if node in self.free:
            self._add(node, needs, 1)
        if node in self.taken:
            self.taken.remove(node)

    def _fits(self, node: str, needs: Needs) -> bool:
        if self.one_per_node and node in self.taken:
            return False
        # The tolerance makes 0.1 + 0.2 CPUs fit in 0.3.
        return all(self.free[node].get(name, 0.0) + 1e-6 >= amount for name, amount in needs.items())

    def _add(self, node: str, needs: Needs, sign: int) -> None:
        for name, amount in needs.items():
            self.free[node][name] = self.free[node].get(name, 0.0) + sign * amount


def can_replace(
    room: FreeResources, old: Sequence[str], old_needs: Needs, needs: Needs, num: int, num_first: int
) -> bool:
    """Whether replicas can be replaced in steps: start `num_first` new ones, then end as many old ones; 0: reversed.

    Args:
        room: free resources, in addition to the old replicas.
        old: node of each old replica.
        old_needs: resources of an old replica.
        needs: resources of a new replica.
        num: number of new replicas.
        num_first: new replicas beyond the pool's number.
    """
    room, old, placed = room.copy(), list(old), 0
    while len(old) > num:  # scale down first
        room.release(old.pop(), old_needs)
    while placed < num:
        if num_first == 0 and old and len(old) + placed >= num:
            room.release(old.pop(), old_needs)
        fitted = room.place(needs, min(num - placed, max(1, num_first) + num - len(old) - placed))
        if not fitted:
            return False
        placed += fitted
        while num_first and old and len(old) + placed > num:
            room.release(old.pop(), old_needs)
    return True
