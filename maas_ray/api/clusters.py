"""The cluster that calls of this process use."""

from pathlib import Path


def connect(
    address: str | None = None,
    *,
    state_dir: str | Path | None = None,
    timeout_s: float = 30.0,
    log_to_driver: bool = False,
) -> str:
    """Connects this process to a Ray cluster; a process that is connected already stays where it is.

    Args:
        address: `host:port` of a head; None: $RAY_ADDRESS, else the cluster that `maas-ray up` started on this machine.
        state_dir: where that cluster is recorded; None: $MAAS_RAY_HOME, else `~/.maas-ray`.
        timeout_s: longest wait for the head.
        log_to_driver: whether the output of workers is shown in this process.

    Returns:
        The address.

    Raises:
        ClusterError: there is no cluster, it does not answer, or it refuses the token.
    """
    from maas_ray import cluster

    return cluster.connect(state_dir=state_dir, address=address, timeout_s=timeout_s, log_to_driver=log_to_driver)


def disconnect() -> None:
    """Leaves the cluster; the cluster and what it serves continue."""
    from maas_ray import cluster

    cluster.disconnect()


def require_connection() -> None:
    """Raises `ClusterError` unless this process is connected to a cluster."""
    from maas_ray.cluster.connection import connected_to
    from maas_ray.errors import ClusterError

    if connected_to() is None:
        raise ClusterError("this process is not connected to a cluster: call maas_ray.connect() first")
