"""Puts our parts into Serve's controller, and says which nodes have a front: all but those with a label."""

from maas_ray.cluster.node.environment import FRONT_LABEL, NO_FRONT
from maas_ray.ray_internals.serve_controller import DeploymentStateManager, replace_parts
from maas_ray.serve.controller.moves import PoolState
from maas_ray.serve.controller.scheduler import PoolScheduler


class PoolStateManager(DeploymentStateManager):  # type: ignore[misc]
    """Serve's state of all deployments, which says where Serve starts a proxy; it adds the head, and leaves out what drains.

    Serve itself names the nodes with a replica: another one that a load balancer asks would not answer.
    """

    def get_active_node_ids(self) -> set[str]:
        """Nodes that have a front, with or without a replica."""
        known = self._cluster_node_info_cache
        nodes = known.get_alive_node_ids()
        return {node for node in nodes if known.get_node_labels(node).get(FRONT_LABEL) != NO_FRONT}


def install() -> None:
    """Called by Serve in its controller's process, before it makes any of these."""
    replace_parts(PoolScheduler, PoolState, PoolStateManager)
