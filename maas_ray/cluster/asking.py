"""Runs a function on every living node, as a task without resources. Needs a connected Ray."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Said(NamedTuple):
    """The result of one node."""

    node_id: str
    address: str
    is_head: bool
    value: Any


def ask_nodes(function: Callable[[], Any], timeout_s: float = 60.0) -> list[Said]:
    """Runs a function on each node.

    Args:
        function: one that workers can import, or small enough to be serialized.
        timeout_s: timeout for all nodes together.

    Raises:
        ray.exceptions.GetTimeoutError: a node exceeded the timeout.
        ray.exceptions.RayError: a node was lost, or the function failed there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(lambda: function())  # Ray accepts no C functions such as `time.time`
    tasks = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    values = ray.get(tasks, timeout=timeout_s)
    return [
        Said(node["NodeID"], node["NodeManagerAddress"], "node:__internal_head__" in node["Resources"], value)
        for node, value in zip(nodes, values, strict=True)
    ]
