"""State of a pool in Serve's controller: the description with which its replicas are started, and their nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maas_ray.errors import SpecError
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.ray_internals.serve import describe, details_of_applications, running_client
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.spec import parse_spec

CONTROLLER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ReplicaState:
    """One replica of a pool."""

    id: str
    state: str
    """Serve's name of the state: `STARTING`, `RUNNING`, `STOPPING`, …"""
    node: str | None
    """None: it is not placed yet."""


@dataclass(frozen=True)
class Standing:
    """A pool in Serve's controller."""

    name: str
    status: str
    """Serve's status of the application: `RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, …"""
    route_prefix: str
    spec: ApplicationSpec | None
    """Wanted state; None: the application is not a pool of this library."""
    version: str | None
    """Digest of everything its replicas are started with; see `binding.version_of`."""
    replicas: Sequence[ReplicaState]

    @property
    def running(self) -> list[ReplicaState]:
        """Replicas that are running."""
        return [replica for replica in self.replicas if replica.state == "RUNNING"]


def read_standings() -> dict[str, Standing]:
    """Returns all applications of the cluster by name; empty if Serve does not run."""
    client = running_client()
    if client is None:
        return {}
    applications = details_of_applications(client)
    return {name: _read(client, name, details) for name, details in applications.items()}


def _read(client: Any, name: str, details: Mapping[str, Any]) -> Standing:
    deployments = details["deployments"]
    replicas = [
        ReplicaState(
            id=str(one["replica_id"]), state=str(getattr(one["state"], "value", one["state"])), node=one.get("node_id")
        )
        for each in deployments.values()
        for one in each["replicas"]
    ]
    spec, version = None, None
    ours = [deployment for deployment in deployments if deployment in (REPLAYABLE, NOT_REPLAYABLE)]
    if ours:
        spec, version = _description(client, name, ours[0])
    return Standing(
        name=name,
        status=str(getattr(details["status"], "value", details["status"])),
        route_prefix=details.get("route_prefix") or "/",
        spec=spec,
        version=version,
        replicas=replicas,
    )


def _description(client: Any, name: str, deployment: str) -> tuple[ApplicationSpec | None, str | None]:
    try:
        found = describe(client, deployment, name, CONTROLLER_TIMEOUT_S)
    except KeyError:
        return None, None  # it is being removed
    try:
        return parse_spec(ApplicationSpec, found.arguments[0], source=f"pool {name!r}"), found.version
    except SpecError:
        return None, found.version  # deployed by a version of this library with other fields
