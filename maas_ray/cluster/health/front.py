"""The addresses of a cluster's HTTP fronts: the configured address, on each node with a front."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests

from maas_ray.addresses import http_url, is_loopback, reachable_host
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.node.state import ClusterState
from maas_ray.errors import ClusterError
from maas_ray.haproxy import HOST_FILE_VARIABLE

HEALTH = "/-/healthz"
"""Health check for load balancers: 200 while the front accepts requests; 503 while it starts, drains or has no pool."""
_MAX_PARALLEL = 16


@dataclass(frozen=True)
class FrontHealth:
    """The HTTP front of one node."""

    node: str
    """Address of the node."""
    url: str
    """Base URL from this machine."""
    problem: str = ""
    """Reason why it does not accept requests; empty if it does."""


def front_urls(host: str, port: int, nodes: Iterable[str]) -> dict[str, str]:
    """The URL of each node's front, by address of the node.

    Args:
        host: address that fronts listen on.
        port: port that fronts listen on.
        nodes: addresses of the nodes with a front.
    """
    listens_everywhere = reachable_host(host) != host
    return {
        node: http_url(node if listens_everywhere and not is_loopback(node) else reachable_host(host), port)
        for node in nodes
    }


def ask_fronts(urls: Mapping[str, str], path: str = HEALTH, timeout_s: float = 5.0) -> list[FrontHealth]:
    """Requests `path` from all fronts in parallel, so that several silent ones cost one timeout.

    Args:
        urls: URLs by node.
        path: path of the health check.
        timeout_s: timeout of one front.
    """
    if not urls:
        return []
    with ThreadPoolExecutor(min(_MAX_PARALLEL, len(urls))) as pool:
        nodes = sorted(urls)
        problems = pool.map(lambda node: _problem(urls[node] + path, timeout_s), nodes)
        return [FrontHealth(node, urls[node], problem) for node, problem in zip(nodes, problems, strict=True)]


def fronts(environment: Mapping[str, str], dashboard: Dashboard, timeout_s: float = 5.0) -> list[FrontHealth]:
    """The health of every front of a cluster; an empty list if nothing has been served yet.

    Args:
        environment: environment of the cluster's processes on this machine.
        dashboard: dashboard of the cluster.
        timeout_s: timeout of one answer.

    Raises:
        ClusterError: the dashboard does not answer.
    """
    found = dashboard.http_address(timeout_s)
    if found is None:
        return []
    host = _configured_host(environment, found[0])
    return ask_fronts(front_urls(host, found[1], dashboard.proxies(timeout_s)), timeout_s=timeout_s)


def front_address(state: ClusterState, dashboard: Dashboard, timeout_s: float = 10.0) -> tuple[str, int]:
    """Host, reachable from this machine, and port of this machine's HTTP front.

    Args:
        state: record of the cluster.
        dashboard: dashboard of the cluster, which reports Serve's options.
        timeout_s: timeout of the dashboard.

    Raises:
        ClusterError: the dashboard does not answer.
    """
    found = dashboard.http_address(timeout_s)
    if found is None:
        return "127.0.0.1", state.http_port
    return reachable_host(_configured_host(state.environment, found[0])), found[1]


def front_url(state: ClusterState, timeout_s: float = 10.0) -> str:
    """Base URL of predictions: the one that the dashboard reports, else the default."""
    if not state.dashboard_url:
        return state.http_url
    try:
        return http_url(*front_address(state, Dashboard(state.dashboard_url, state.token()), timeout_s))
    except ClusterError:
        return state.http_url


def _configured_host(environment: Mapping[str, str], host: str) -> str:
    # With HAProxy on one machine Serve listens on loopback; the launcher's file contains the front's address.
    host_file = environment.get(HOST_FILE_VARIABLE)
    if host_file and Path(host_file).exists():
        return Path(host_file).read_text().strip()
    return host


def _problem(url: str, timeout_s: float) -> str:
    with requests.Session() as session:
        session.trust_env = False  # a cluster's addresses need no proxy
        try:
            answer = session.get(url, timeout=timeout_s)
        except requests.RequestException as error:
            return f"{url} does not answer ({type(error).__name__})"
        return "" if answer.status_code == 200 else f"{url} answers {answer.status_code}"
