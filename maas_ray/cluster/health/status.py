"""The status of the recorded cluster, from its dashboard. Changes nothing and needs no Ray in this process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maas_ray.addresses import http_url
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.health.front import front_address, fronts
from maas_ray.cluster.health.unavailable import unavailable
from maas_ray.cluster.node.state import ClusterState, load_state
from maas_ray.errors import ClusterError
from maas_ray.haproxy.config.capacity import read_capacities
from maas_ray.haproxy.names import REFUSED_FILE


@dataclass(frozen=True)
class ClusterStatus:
    """The status of the local cluster; if `is_running` is False, only `detail` is meaningful too."""

    is_running: bool
    detail: str
    profile: str = ""
    address: str = ""
    dashboard_url: str = ""
    http_url: str = ""
    fronts: dict[str, str] = field(default_factory=dict)
    """State of each node's front, by URL: `answers`, or the reason why it accepts no requests."""
    started_s: float = 0.0
    """Seconds since 1970."""
    num_nodes: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    """Total of all live nodes."""
    applications: dict[str, str] = field(default_factory=dict)
    """Serve's applications and their state, such as RUNNING."""
    few_connections: tuple[str, ...] = ()
    """A line for each HAProxy of this machine with fewer connections than configured, or that cannot start."""
    unavailable: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Models that are not served, by application, each with its version and the reason."""


def status(*, state_dir: str | Path | None = None, timeout_s: float = 10.0) -> ClusterStatus:
    """The status of the cluster that `up` recorded.

    Args:
        state_dir: see `state_directory`.
        timeout_s: timeout of one request.

    Raises:
        ClusterError: the record of the cluster is damaged.
    """
    state = load_state(state_dir)
    if state is None:
        return ClusterStatus(False, "no cluster is recorded; start one with `maas-ray up`")
    if state.role == "worker":
        return _worker_status(state, timeout_s)
    try:
        dashboard = Dashboard(state.dashboard_url, state.token())
        nodes = _alive_nodes(dashboard, timeout_s)
        applications = dashboard.applications(timeout_s)
        front = http_url(*front_address(state, dashboard, timeout_s))
        every = fronts(state.environment, dashboard, timeout_s)
    except ClusterError as error:
        return ClusterStatus(False, f"{error}; `maas-ray down` removes the remains")
    return ClusterStatus(
        is_running=True,
        detail="running",
        profile=state.profile,
        address=state.address,
        dashboard_url=state.dashboard_url,
        http_url=front,
        fronts={found.url: found.problem or "answers" for found in every},
        started_s=state.started_s,
        num_nodes=len(nodes),
        resources=total_resources(nodes),
        applications={name: str(app["status"]) for name, app in applications.items()},
        few_connections=fronts_with_few_connections(Path(state.temp_dir, "h")),
        unavailable=_unavailable(front, applications, timeout_s),
    )


def _worker_status(state: ClusterState, timeout_s: float) -> ClusterStatus:
    """The status on a worker node, without the dashboard, which only the head node can reach."""
    from maas_ray.cluster.connection import check_head, use_environment
    from maas_ray.ray_internals.gcs import alive_nodes

    use_environment({name: value for name, value in state.environment.items() if name.startswith("RAY_AUTH")})
    try:
        check_head(state.address, timeout_s=timeout_s)
        nodes = alive_nodes(state.address)
    except Exception as error:  # any error of Ray for an unreachable head node
        return ClusterStatus(
            False, f"the head node {state.address} does not answer: {error}; `maas-ray down` leaves the cluster"
        )
    if state.node_id not in nodes:
        return ClusterStatus(
            False, f"the head node {state.address} has removed this node; run `maas-ray down`, then join again"
        )
    return ClusterStatus(
        is_running=True,
        detail=f"a node of the cluster {state.address}",
        profile=state.profile,
        address=state.address,
        http_url=state.http_url,
        started_s=state.started_s,
        num_nodes=len(nodes),
    )


def total_resources(nodes: list[dict[str, Any]]) -> dict[str, float]:
    """Sum of `resources_total` over nodes, without Ray's internal per-node entries."""
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node["resources_total"].items():
            if not name.startswith("node:"):
                total[name] = total.get(name, 0.0) + float(amount)
    return total


def fronts_with_few_connections(fronts: Path) -> tuple[str, ...]:
    """Descriptions of the fronts below a folder that did not start, or accept fewer connections than they should."""
    refused = [file.read_text().strip() for file in sorted(fronts.glob(f"*/{REFUSED_FILE}"))]
    return (*refused, *(str(each) for each in read_capacities(fronts) if each.is_reduced))


def _unavailable(front: str, applications: dict[str, Any], timeout_s: float) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, application in applications.items():
        is_awake = any(deployment.get("replicas") for deployment in application.get("deployments", {}).values())
        if is_awake and (models := unavailable(front, application.get("route_prefix") or "", timeout_s)):
            found[name] = models
    return found


def _alive_nodes(dashboard: Dashboard, timeout_s: float) -> list[dict[str, Any]]:
    answer = dashboard.get("/api/v0/nodes?detail=true", timeout_s)
    return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
