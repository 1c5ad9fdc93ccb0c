"""The parts of Serve's controller that `serve/controller` derives from, and how ours get into it.

Imports ray.serve. Read in Ray 2.60.0: `ray.serve._private.deployment_scheduler`, `deployment_state`, `controller`.
"""

# As `nodes.labels_match`, without a call around it: it is asked for each node in each round of placing.
from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]
from ray.serve._private.deployment_scheduler import DeploymentScheduler  # which node gets a replica
from ray.serve._private.deployment_state import (
    DeploymentState,  # one deployment: how many replicas it has
    DeploymentStateManager,  # all of them: which nodes have a front
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
    """Has the controller of this process make ours; called before it makes any of these."""
    from ray.serve._private import controller, default_impl, deployment_state  # the first: in a controller only

    default_impl.DeploymentScheduler = scheduler
    deployment_state.DeploymentState = state
    controller.DeploymentStateManager = manager
