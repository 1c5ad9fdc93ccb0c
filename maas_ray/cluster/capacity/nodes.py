"""The living nodes of a cluster: what each has, what is free on it now, and its labels."""

from collections.abc import Mapping
from dataclasses import dataclass

from maas_ray.cluster.capacity.preflight import Resources
from maas_ray.errors import ClusterError
from maas_ray.ray_internals.nodes import draining_nodes, free_resources, labels_match


@dataclass(frozen=True)
class Node:
    """A node that takes new work."""

    id: str
    address: str
    total: Resources
    free: Resources
    """As Ray's scheduler knew it about a second ago."""
    labels: Mapping[str, str]

    def has_labels(self, wanted: Mapping[str, str]) -> bool:
        """Whether it has labels, in Ray's notation: `A`, `!A`, `in(A,B)`, `!in(A,B)`."""
        return not wanted or labels_match(self.labels, wanted)


def living_nodes() -> list[Node]:
    """All nodes but those that are being drained. Raises `ClusterError` if this process is not connected to Ray."""
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
