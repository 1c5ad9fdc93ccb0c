"""The live nodes of a cluster: their total and free resources and their labels."""

from collections.abc import Mapping
from dataclasses import dataclass

from maas_ray.cluster.capacity.preflight import Resources
from maas_ray.errors import ClusterError
from maas_ray.ray_internals.nodes import draining_nodes, free_resources, labels_match


@dataclass(frozen=True)
class Node:
    """A node that accepts new work."""

    id: str
    address: str
    total: Resources
    free: Resources
    """As reported by Ray's scheduler, about a second old."""
    labels: Mapping[str, str]

    def has_labels(self, wanted: Mapping[str, str]) -> bool:
        """Whether the node's labels match `wanted`, in Ray's notation: `A`, `!A`, `in(A,B)`, `!in(A,B)`."""
        return not wanted or labels_match(self.labels, wanted)


def living_nodes() -> list[Node]:
    """All live nodes that are not draining. Raises `ClusterError` if this process is not connected to Ray."""
    import ray

    if not ray.is_initialized():
        raise ClusterError("not connected to a Ray cluster; start one with `maas-ray up`, or set RAY_ADDRESS")
    going, free = draining_nodes(), free_resources()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=_plain(node["Resources"]),
            free=_plain(free.get(node["NodeID"], {})),
            labels=dict(node.get("Labels") or {}),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in going
    ]


def _plain(resources: Resources) -> dict[str, float]:
    return {name: float(amount) for name, amount in resources.items() if not name.startswith("node:")}
