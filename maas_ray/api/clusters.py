"""Connects this process to a cluster, which all further calls use."""

from pathlib import Path


def connect(
    address: str | None = None,
    *,
    state_dir: str | Path | None = None,
    timeout_s: float = 30.0,
    log_to_driver: bool = False,
) -> str:
    """Connects this process to a Ray cluster; a connected process keeps its connection.

    Args:
        address: `host:port` of the head node; None: $RAY_ADDRESS, else the cluster of `maas-ray up` on this machine.
        state_dir: directory of the local cluster's record; None: $MAAS_RAY_HOME, else `~/.maas-ray`.
        timeout_s: timeout for the head node.
        log_to_driver: whether this process prints the output of workers.

    Returns:
        The address of the cluster.

    Raises:
        ClusterError: no cluster exists, it does not answer, or it rejects the token.
    """
    from maas_ray import cluster

    return cluster.connect(state_dir=state_dir, address=address, timeout_s=timeout_s, log_to_driver=log_to_driver)


def disconnect() -> None:
    """Disconnects this process; the cluster and its pools continue to run."""
    from maas_ray import cluster

    cluster.disconnect()


def require_connection() -> None:
    """Raises `ClusterError` unless this process is connected to a cluster."""
    from maas_ray.cluster.connection import connected_to
    from maas_ray.errors import ClusterError

    if connected_to() is None:
        raise ClusterError("this process is not connected to a cluster; call maas_ray.connect() first")
