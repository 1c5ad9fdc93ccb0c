"""Drains the node of this machine before it leaves a cluster: its work moves to other nodes first."""

import time

from maas_ray.cluster.connection import check_head, use_environment
from maas_ray.cluster.node.state import ClusterState
from maas_ray.display import get_logger
from maas_ray.ray_internals import gcs

log = get_logger(__name__)

POLL_S = 0.2


def leave(state: ClusterState, timeout_s: float) -> bool:
    """Drains the node of this machine: its replicas are replaced and finish, training commits and moves to other nodes.

    Args:
        state: the node's record.
        timeout_s: timeout of the drain.

    Returns:
        Whether all work has left the node; also False if the head node did not answer.
    """
    use_environment({name: value for name, value in state.environment.items() if name.startswith("RAY_AUTH")})
    deadline = time.monotonic() + timeout_s
    try:
        check_head(state.address, timeout_s=min(5.0, timeout_s))
        until_ms = int((time.time() + timeout_s) * 1000)
        gcs.drain(state.address, state.node_id, "maas-ray down", until_ms, min(10.0, timeout_s))
        # A draining node ends itself once it has no work.
        while state.node_id in gcs.alive_nodes(state.address):
            if time.monotonic() > deadline:
                log.warning("this node still had work after %g s; that work is lost or repeated elsewhere", timeout_s)
                return False
            time.sleep(POLL_S)
    except Exception as error:  # any error of Ray for an unreachable head node: the machine leaves nevertheless
        log.warning("this node was not drained because the head node %s did not answer: %s", state.address, error)
        return False
    return True
