"""The base classes of `serve/controller` in Serve's controller, and their replacement by ours.

Imports ray.serve. Read in Ray 2.60.0: `ray.serve._private.deployment_scheduler`, `deployment_state`, `controller`.
"""

# Same as `nodes.labels_match`, but without a wrapper: it is called for each node in each round of placement.
from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]
from ray.serve._private.deployment_scheduler import DeploymentScheduler  # chooses the node of a replica
from ray.serve._private.deployment_state import (
    DeploymentState,  # the replicas of one deployment
    DeploymentStateManager,  # all deployments, and the nodes with a front
)

__all__ = [
    "DeploymentScheduler",
    "DeploymentState",
    "DeploymentStateManager",
    "node_labels_match_selector",
    "replace_parts",
]


def replace_parts(
    scheduler: type[DeploymentScheduler], state: type[DeploymentState], manager: type[DeploymentStateManager]
) -> None:
    """Makes the controller of this process create our classes; called before it creates any of these."""
    from ray.serve._private import controller, default_impl, deployment_state  # the first: only in a controller

    default_impl.DeploymentScheduler = scheduler
    deployment_state.DeploymentState = state
    controller.DeploymentStateManager = manager
