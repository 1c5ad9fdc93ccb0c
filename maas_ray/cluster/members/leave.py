"""Takes the node of this machine out of a cluster in order: what runs on it goes on elsewhere first."""

import time

from maas_ray.cluster.connection import check_head, use_environment
from maas_ray.cluster.node.state import ClusterState
from maas_ray.display import get_logger
from maas_ray.ray_internals import gcs

log = get_logger(__name__)

POLL_S = 0.2


def leave(state: ClusterState, timeout_s: float) -> bool:
    """Drains the node of this machine: its replicas are replaced elsewhere and finish, training commits and moves on.

    Args:
        state: its record.
        timeout_s: longest wait.

    Returns:
        Whether nothing was left on it. False also where the head did not answer: then nobody knows.
    """
    use_environment({name: value for name, value in state.environment.items() if name.startswith("RAY_AUTH")})
    deadline = time.monotonic() + timeout_s
    try:
        check_head(state.address, timeout_s=min(5.0, timeout_s))
        until_ms = int((time.time() + timeout_s) * 1000)
        gcs.drain(state.address, state.node_id, "maas-ray down", until_ms, min(10.0, timeout_s))
        # Once nothing is left on it, a node that drains ends itself.
        while state.node_id in gcs.alive_nodes(state.address):
            if time.monotonic() > deadline:
                log.warning(
                    "this node still had work after %g s; what it held is lost or repeated elsewhere", timeout_s
                )
                return False
            time.sleep(POLL_S)
    except Exception as error:  # whatever Ray raises for a head that is away: the machine is to leave all the same
        log.warning("this node was not drained, because the head %s did not answer: %s", state.address, error)
        return False
    return True
