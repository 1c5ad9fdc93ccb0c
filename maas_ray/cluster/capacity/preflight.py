"""Says within seconds whether a cluster can ever hold a set of workers. Ray itself would wait for them for ever.

"Ever" counts what the living nodes have in total, busy or not, and what the autoscaler may add where there is one.
"""

import time
from collections.abc import Mapping, Sequence

from maas_ray.errors import ClusterError, ResourcesMissing
from maas_ray.ray_internals.nodes import cluster_config

POLL_S = 0.5
Resources = Mapping[str, float]


def preflight(num_workers: int, resources: Resources, *, together: int = 1, wait_s: float = 0.0) -> None:
    """Refuses workers that the connected cluster can never hold.

    Args:
        num_workers: how many workers must run at the same time.
        resources: what each one takes, by Ray's names (`CPU`, `GPU`, `memory` in bytes, …); zeros do not count.
        together: how many of them have to be on one node; a divisor of `num_workers`.
        wait_s: time for more nodes to join before the verdict.

    Raises:
        ResourcesMissing: even the whole cluster cannot hold them; says what is missing, how much there is, what to do.
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
    """Returns once at least `num_nodes` nodes, the head included, are alive.

    Raises:
        ResourcesMissing: they have not joined within `timeout_s`.
        ClusterError: this process is not connected to Ray.
    """
    deadline = time.monotonic() + timeout_s
    while (alive := len(alive_nodes())) < num_nodes:
        if time.monotonic() >= deadline:
            raise ResourcesMissing(
                f"{alive} of {num_nodes} nodes have joined the cluster within {timeout_s:g} s; look at `ray status` on "
                "the head, and at the token and RAY_AUTH_MODE of the nodes that are missing"
            )
        time.sleep(POLL_S)


def alive_nodes() -> list[dict[str, float]]:
    """Total resources of each living node. Raises `ClusterError` if this process is not connected to Ray."""
    import ray

    if not ray.is_initialized():
        raise ClusterError("not connected to a Ray cluster; start one with `maas-ray up`, or set RAY_ADDRESS")
    return [
        {name: float(amount) for name, amount in node["Resources"].items() if not name.startswith("node:")}
        for node in ray.nodes()
        if node["Alive"]
    ]


def count_workers(nodes: Sequence[Resources], needed: Resources, limit: int) -> int:
    """How many equal workers fit on nodes that run nothing else, counted up to `limit`; a worker lies on one node."""
    if not needed:
        return limit if nodes else 0
    # The tolerance keeps 0.1 + 0.2 CPUs inside 0.3.
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
            f"{num_workers * needed[name] - total[name]:g} {name} (needed {num_workers * needed[name]:g}, there are "
            f"{total[name]:g})"
            for name in short
        )
    elif together > 1:
        reason = f"each {together} of them have to be on one node, and too few nodes are large enough for that"
    else:
        reason = "the resources are there in total, but split over nodes so that not all workers fit"
    each = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
    return (
        f"{num_workers} workers of {each} each can never run on this cluster of {len(nodes)} nodes, which holds "
        f"{capacity} of them: {reason}; lower workers.count or the resources of one worker, or add nodes "
        "(`maas-ray up --num-cpus` on one machine)"
    )


def has_autoscaler() -> bool:
    """Whether an autoscaler has told Ray its limits."""
    return cluster_config() is not None


def autoscaler_capacity(needed: Resources, limit: int) -> int:
    """Workers that the autoscaler's node groups could hold at their largest; 0 where no autoscaler has told Ray its limits."""
    config = cluster_config()
    if config is None:
        return 0
    capacity = 0
    for group in config.node_group_configs:
        one_node = count_workers([dict(group.resources)], needed, limit)
        num_nodes = limit if group.max_count < 0 else group.max_count  # -1: without limit
        capacity += one_node * num_nodes
    return min(limit, capacity)
