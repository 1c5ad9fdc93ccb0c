"""Where a recorded cluster answers predictions: the address that was configured when pools were served, else the usual one."""

from pathlib import Path

from maas_ray.addresses import http_url, reachable_host
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.state import ClusterState
from maas_ray.errors import ClusterError
from maas_ray.haproxy import HOST_FILE_VARIABLE


def front_address(state: ClusterState, dashboard: Dashboard, timeout_s: float = 10.0) -> tuple[str, int]:
    """Host, as seen from this machine, and port of the HTTP front.

    Args:
        state: the recorded cluster.
        dashboard: of that cluster; asked for what Serve was started with.
        timeout_s: longest wait for its answer.

    Raises:
        ClusterError: the dashboard does not answer.
    """
    found = dashboard.http_address(timeout_s)
    if found is None:
        return "127.0.0.1", state.http_port
    host, port = found
    # Behind HAProxy Serve itself is given loopback; the address to listen on is in the launcher's file.
    host_file = state.environment.get(HOST_FILE_VARIABLE) if state.profile == "fast" else None
    if host_file and Path(host_file).exists():
        host = Path(host_file).read_text().strip()
    return reachable_host(host), port


def front_url(state: ClusterState, timeout_s: float = 10.0) -> str:
    """Base URL of predictions; the usual one where the dashboard does not say another."""
    try:
        return http_url(*front_address(state, Dashboard(state.dashboard_url, state.token()), timeout_s))
    except ClusterError:
        return state.http_url
