"""Status of pools in Serve, and waits for a status. Every wait has a time limit."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from maas_ray.errors import ClusterError
from maas_ray.ray_internals.serve import details_of_applications, running_client
from maas_ray.serve.deploy.notes import noted

POLL_S = 0.25
_REASON = re.compile(r"^(?:maas_ray\.errors\.\w+|[\w.]*(?:Error|Exception)): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class PoolStatus:
    """Status of a pool in Serve."""

    name: str
    status: str
    """Serve's status: `RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, `UNHEALTHY`, `DELETING`, …"""
    route_prefix: str
    num_running: int
    """Number of running replicas."""
    message: str
    """Why it is not healthy, or differs from the last `maas-ray serve`; else empty."""
    unserved: tuple[str, ...] = ()
    """Models that it cannot serve although it is healthy, each with the reason; set by `deploy`."""


def status(names: Iterable[str] | None = None) -> list[PoolStatus]:
    """Returns the status of all pools of the cluster, or of those in `names` that exist."""
    if not ray.is_initialized():
        raise ClusterError(
            "not connected to a Ray cluster; start one with `maas-ray up`, or call ray.init(address=...)"
        )
    wanted = None if names is None else set(names)
    applications = serve.status().applications
    routes = _routes()
    return [
        PoolStatus(
            name=name,
            status=str(application.status.value),
            route_prefix=routes.get(name, ""),
            num_running=sum(item.replica_states.get("RUNNING", 0) for item in application.deployments.values()),
            message=noted(name) if application.status == ApplicationStatus.RUNNING else _reason(application),
        )
        for name, application in applications.items()
        if wanted is None or name in wanted
    ]


def wait(what: str, deadline: float, timeout_s: float, is_done: Callable[[], str]) -> None:
    """Polls until `is_done` returns an empty string; the last text that it returned is the reason of a timeout."""
    while missing := is_done():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} did not complete within {timeout_s:g} s: {missing}")
        time.sleep(POLL_S)


def is_running(name: str) -> str:
    """Returns an empty string once a pool runs, else the reason. Raises `ClusterError` if its deployment failed."""
    application = serve.status().applications.get(name)
    if application is None:
        return "Serve does not list it yet"
    if application.status == ApplicationStatus.RUNNING:
        return ""
    reason = _reason(application)
    if application.status == ApplicationStatus.DEPLOY_FAILED:
        raise ClusterError(f"pool {name!r} could not be deployed: {reason}")
    return f"{application.status.value}: {reason or 'Serve reports no reason'}"


def is_gone(name: str) -> str:
    """Returns an empty string once a pool is removed, else its status."""
    application = serve.status().applications.get(name)
    return "" if application is None else f"its status is {application.status.value}"


def _reason(application: ApplicationStatusOverview) -> str:
    """Returns the replica's own message if there is one: the last error line of the traceback that Serve reports."""
    texts = [application.message, *(item.message for item in application.deployments.values())]
    for text in reversed(texts):
        if found := _REASON.findall(text):
            return str(found[-1])
    return "; ".join(text.strip() for text in dict.fromkeys(texts) if text.strip())[-2000:]


def _routes() -> dict[str, str]:
    client = running_client()
    if client is None:
        return {}
    applications = details_of_applications(client)
    return {name: details.get("route_prefix") or "" for name, details in applications.items()}
