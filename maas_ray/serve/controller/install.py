"""Installs our classes in Serve's controller, and selects the nodes with a front: all except those with a label."""

from maas_ray.cluster.node.environment import FRONT_LABEL, NO_FRONT
from maas_ray.ray_internals.serve_controller import DeploymentStateManager, replace_parts
from maas_ray.serve.controller.moves import PoolState
from maas_ray.serve.controller.scheduler import PoolScheduler


class PoolStateManager(DeploymentStateManager):  # type: ignore[misc]
    """Serve's state of all deployments, which determines where proxies start; adds the head, omits draining nodes.

    Serve itself returns only nodes with a replica: a load balancer would get no answer from the others.
    """

    def get_active_node_ids(self) -> set[str]:
        """Returns the nodes that have a front, with or without a replica."""
        known = self._cluster_node_info_cache
        nodes = known.get_alive_node_ids()
        return {node for node in nodes if known.get_node_labels(node).get(FRONT_LABEL) != NO_FRONT}


def install() -> None:
    """Called by Serve in its controller's process, before it creates any of these objects."""
    replace_parts(PoolScheduler, PoolState, PoolStateManager)
