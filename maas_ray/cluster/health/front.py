"""Where a cluster answers predictions: the address that was configured when pools were served, on each node that has a front."""

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
"""What a load balancer asks: 200 while the front of this node takes requests, 503 while it starts, drains or has no pool."""
_MAX_PARALLEL = 16


@dataclass(frozen=True)
class FrontHealth:
    """The HTTP front of one node."""

    node: str
    """Address of the node."""
    url: str
    """Base URL, as it is reached from this machine."""
    problem: str = ""
    """Why it does not take requests; empty if it does."""


def front_urls(host: str, port: int, nodes: Iterable[str]) -> dict[str, str]:
    """The URL of each node's front, by the node's address.

    Args:
        host: what fronts listen on.
        port: their port.
        nodes: addresses of nodes that have one.
    """
    listens_everywhere = reachable_host(host) != host
    return {
        node: http_url(node if listens_everywhere and not is_loopback(node) else reachable_host(host), port)
        for node in nodes
    }


def ask_fronts(urls: Mapping[str, str], path: str = HEALTH, timeout_s: float = 5.0) -> list[FrontHealth]:
    """Asks each front; several at a time, so that silent ones cost one wait.

    Args:
        urls: by node.
        path: what to get.
        timeout_s: longest wait for one.
    """
    if not urls:
        return []
    with ThreadPoolExecutor(min(_MAX_PARALLEL, len(urls))) as pool:
        nodes = sorted(urls)
        problems = pool.map(lambda node: _problem(urls[node] + path, timeout_s), nodes)
        return [FrontHealth(node, urls[node], problem) for node, problem in zip(nodes, problems, strict=True)]


def fronts(environment: Mapping[str, str], dashboard: Dashboard, timeout_s: float = 5.0) -> list[FrontHealth]:
    """Every front of a cluster, asked; none where nothing was served yet.

    Args:
        environment: of the cluster's processes on this machine.
        dashboard: of that cluster.
        timeout_s: longest wait for one answer.

    Raises:
        ClusterError: the dashboard does not answer.
    """
    found = dashboard.http_address(timeout_s)
    if found is None:
        return []
    host = _configured_host(environment, found[0])
    return ask_fronts(front_urls(host, found[1], dashboard.proxies(timeout_s)), timeout_s=timeout_s)


def front_address(state: ClusterState, dashboard: Dashboard, timeout_s: float = 10.0) -> tuple[str, int]:
    """Host, as seen from this machine, and port of this machine's HTTP front.

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
    return reachable_host(_configured_host(state.environment, found[0])), found[1]


def front_url(state: ClusterState, timeout_s: float = 10.0) -> str:
    """Base URL of predictions; the usual one where the dashboard does not say another."""
    if not state.dashboard_url:
        return state.http_url
    try:
        return http_url(*front_address(state, Dashboard(state.dashboard_url, state.token()), timeout_s))
    except ClusterError:
        return state.http_url


def _configured_host(environment: Mapping[str, str], host: str) -> str:
    # Behind HAProxy on one machine Serve itself is given loopback; the address to listen on is in the launcher's file.
    host_file = environment.get(HOST_FILE_VARIABLE)
    if host_file and Path(host_file).exists():
        return Path(host_file).read_text().strip()
    return host


def _problem(url: str, timeout_s: float) -> str:
    with requests.Session() as session:
        session.trust_env = False  # the cluster's own addresses are never reached through a proxy
        try:
            answer = session.get(url, timeout=timeout_s)
        except requests.RequestException as error:
            return f"{url} does not answer ({type(error).__name__})"
        return "" if answer.status_code == 200 else f"{url} answers {answer.status_code}"
