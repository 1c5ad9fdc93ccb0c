"""What Ray's head knows of the nodes of the cluster that this process is connected to. Imports Ray when asked.

Publicly Ray tells what nodes have in total; not what is free on each, which of them are drained, what the autoscaler may add,
and whether a node has labels. Read in Ray 2.60.0: `ray._private.state`, `ray._raylet`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from maas_ray.ray_internals import kv


class NodeGroup(NamedTuple):
    """Nodes of one kind that an autoscaler starts."""

    name: str
    min_count: int
    max_count: int
    resources: Mapping[str, int]
    """Of one node, by Ray's names."""


def free_resources() -> dict[str, dict[str, float]]:
    """What is free on each living node, by its id, as Ray's scheduler knew it about a second ago."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are being drained: their machine is about to be taken away, or they have nothing to do."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def labels_match(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node with `labels` is one that `wanted` selects, in Ray's notation: `A`, `!A`, `in(A,B)`, `!in(A,B)`.

    By Ray's own code, so that what we count is what Ray's scheduler will do.
    """
    from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]

    return bool(node_labels_match_selector(dict(labels), dict(wanted)))


def cluster_config() -> Any:
    """What an autoscaler has told Ray of its limits, as Ray's message `ClusterConfig`; None where none has."""
    from ray._private.state import state

    return state.get_cluster_config()


def declare_cluster_config(groups: Iterable[NodeGroup]) -> None:
    """Tells Ray how large an autoscaler may make the cluster; Ray 2.60's own launcher keeps that to itself."""
    import ray
    from ray.core.generated import autoscaler_pb2

    message = autoscaler_pb2.ClusterConfig()
    for one in groups:
        group = message.node_group_configs.add(name=one.name, min_count=one.min_count, max_count=one.max_count)
        for resource, amount in one.resources.items():
            group.resources[resource] = amount
    key, namespace = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE
    kv.put(key.encode(), message.SerializeToString(), namespace.encode())
