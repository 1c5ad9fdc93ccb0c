"""State of the nodes of the connected cluster, from Ray's head node. Imports Ray late.

Ray's public API reports the total resources of nodes, but not the free ones, draining nodes, the limits of the
autoscaler, or whether labels match. Read in Ray 2.60.0: `ray._private.state`, `ray._raylet`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from maas_ray.ray_internals import kv


class NodeGroup(NamedTuple):
    """A group of equal nodes that an autoscaler starts."""

    name: str
    min_count: int
    max_count: int
    resources: Mapping[str, int]
    """Resources of one node, by Ray's names."""


def free_resources() -> dict[str, dict[str, float]]:
    """Free resources of each live node, by its id, as reported by Ray's scheduler about a second ago."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def draining_nodes() -> frozenset[str]:
    """Ids of the draining nodes: their machine is about to be removed, or they are idle."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def labels_match(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether `wanted` selects a node with `labels`, in Ray's notation: `A`, `!A`, `in(A,B)`, `!in(A,B)`.

    Uses Ray's own code, so that the result is the same as in Ray's scheduler.
    """
    from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]

    return bool(node_labels_match_selector(dict(labels), dict(wanted)))


def cluster_config() -> Any:
    """The limits that an autoscaler has reported to Ray, as Ray's message `ClusterConfig`, or None."""
    from ray._private.state import state

    return state.get_cluster_config()


def declare_cluster_config(groups: Iterable[NodeGroup]) -> None:
    """Reports the autoscaler's limits to Ray, which the cluster launcher of Ray 2.60 does not."""
    import ray
    from ray.core.generated import autoscaler_pb2

    message = autoscaler_pb2.ClusterConfig()
    for one in groups:
        group = message.node_group_configs.add(name=one.name, min_count=one.min_count, max_count=one.max_count)
        for resource, amount in one.resources.items():
            group.resources[resource] = amount
    key, namespace = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE
    kv.put(key.encode(), message.SerializeToString(), namespace.encode())
