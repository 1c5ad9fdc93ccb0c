"""Determines within seconds whether a cluster can ever run a set of workers, for which Ray would wait forever.

The capacity is the total of all live nodes, busy or not, and of the nodes that an autoscaler may add.
"""

import time
from collections.abc import Mapping, Sequence

from maas_ray.errors import ClusterError, ResourcesMissing
from maas_ray.ray_internals.nodes import cluster_config

POLL_S = 0.5
Resources = Mapping[str, float]


def preflight(num_workers: int, resources: Resources, *, together: int = 1, wait_s: float = 0.0) -> None:
    """Raises an error for workers that the connected cluster can never run.

    Args:
        num_workers: number of workers that must run at the same time.
        resources: resources of one worker, by Ray's names (`CPU`, `GPU`, `memory` in bytes, …); zeros are ignored.
        together: number of workers that must share a node; a divisor of `num_workers`.
        wait_s: time for more nodes to join before the error.

    Raises:
        ResourcesMissing: the total of the cluster is insufficient; the message has the deficit, the total and a fix.
        ClusterError: this process is not connected to Ray.
    """
    needed = {name: float(amount) for name, amount in resources.items() if amount > 0}
    deadline = time.monotonic() + wait_s
    while True:
        nodes, pieces = alive_nodes(), num_workers // together
        piece = {name: amount * together for name, amount in needed.items()}
        capacity = together * max(count_workers(nodes, piece, pieces), autoscaler_capacity(piece, pieces))
        if capacity >= num_workers:
            return
        if time.monotonic() >= deadline:
            raise ResourcesMissing(explain(num_workers, needed, nodes, capacity, together))
        time.sleep(POLL_S)


def wait_for_nodes(num_nodes: int, *, timeout_s: float) -> None:
    """Returns once at least `num_nodes` nodes, including the head node, are alive.

    Raises:
        ResourcesMissing: they have not joined within `timeout_s`.
        ClusterError: this process is not connected to Ray.
    """
    deadline = time.monotonic() + timeout_s
    while (alive := len(alive_nodes())) < num_nodes:
        if time.monotonic() >= deadline:
            raise ResourcesMissing(
                f"{alive} of {num_nodes} nodes have joined the cluster within {timeout_s:g} s; check `ray status` on "
                "the head node, and the token and RAY_AUTH_MODE on the missing nodes"
            )
        time.sleep(POLL_S)


def alive_nodes() -> list[dict[str, float]]:
    """Total resources of each live node. Raises `ClusterError` if this process is not connected to Ray."""
    import ray

    if not ray.is_initialized():
        raise ClusterError("not connected to a Ray cluster; start one with `maas-ray up`, or set RAY_ADDRESS")
    return [
        {name: float(amount) for name, amount in node["Resources"].items() if not name.startswith("node:")}
        for node in ray.nodes()
        if node["Alive"]
    ]


def count_workers(nodes: Sequence[Resources], needed: Resources, limit: int) -> int:
    """Number of equal workers that fit on idle nodes, at most `limit`; a worker does not span nodes."""
    if not needed:
        return limit if nodes else 0
    # The tolerance makes 0.1 + 0.2 CPUs fit into 0.3.
    fits = [min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items()) for node in nodes]
    return min(limit, sum(fits))


def explain(num_workers: int, needed: Resources, nodes: Sequence[Resources], capacity: int, together: int = 1) -> str:
    """The message of `ResourcesMissing`."""
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in needed}
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in needed}
    short = [name for name in needed if total[name] < num_workers * needed[name]]
    too_big = [name for name in needed if largest[name] < needed[name]]
    if too_big:
        reason = "no node is large enough: " + ", ".join(
            f"one worker needs {needed[name]:g} {name}, the largest node has {largest[name]:g}" for name in too_big
        )
    elif short:
        reason = "missing " + ", ".join(
            f"{num_workers * needed[name] - total[name]:g} {name} (needed {num_workers * needed[name]:g}, available "
            f"{total[name]:g})"
            for name in short
        )
    elif together > 1:
        reason = f"groups of {together} workers must share a node, and too few nodes are large enough"
    else:
        reason = "the total suffices, but is split over nodes so that not all workers fit"
    each = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
    return (
        f"{num_workers} workers of {each} each can never run on this cluster of {len(nodes)} nodes, which can run "
        f"{capacity} of them: {reason}; lower workers.count or the resources of one worker, or add nodes "
        "(`maas-ray up --num-cpus` on one machine)"
    )


def has_autoscaler() -> bool:
    """Whether an autoscaler has reported its limits to Ray."""
    return cluster_config() is not None


def autoscaler_capacity(needed: Resources, limit: int) -> int:
    """Number of workers that fit on the autoscaler's node groups at their largest; 0 without reported limits."""
    config = cluster_config()
    if config is None:
        return 0
    capacity = 0
    for group in config.node_group_configs:
        one_node = count_workers([dict(group.resources)], needed, limit)
        num_nodes = limit if group.max_count < 0 else group.max_count  # -1: without limit
        capacity += one_node * num_nodes
    return min(limit, capacity)
