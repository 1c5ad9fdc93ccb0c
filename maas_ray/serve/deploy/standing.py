"""What Serve's controller holds of a pool: its description, as its replicas are started with it, and where they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.context import _get_global_client
from ray.serve.generated.serve_pb2 import DeploymentRoute

from maas_ray.errors import SpecError
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.spec import parse_spec

CONTROLLER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ReplicaState:
    """One replica of a pool."""

    id: str
    state: str
    """Serve's word: `STARTING`, `RUNNING`, `STOPPING`, …"""
    node: str | None
    """None: it has no room yet."""


@dataclass(frozen=True)
class Standing:
    """A pool that Serve knows."""

    name: str
    status: str
    """Serve's word for the application: `RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, …"""
    route_prefix: str
    spec: ApplicationSpec | None
    """What it is to be; None: it is none of ours."""
    version: str | None
    """Stands for what its replicas are started with; see `binding.version_of`."""
    replicas: Sequence[ReplicaState]

    @property
    def running(self) -> list[ReplicaState]:
        """Replicas that answer."""
        return [replica for replica in self.replicas if replica.state == "RUNNING"]


def read_standings() -> dict[str, Standing]:
    """All applications of the cluster by name; none where Serve does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    applications = client.get_serve_details()["applications"]
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
        answer = client._controller.get_deployment_info.remote(deployment, name)
        route = DeploymentRoute.FromString(ray.get(answer, timeout=CONTROLLER_TIMEOUT_S))
    except KeyError:
        return None, None  # it goes away at this moment
    info = DeploymentInfo.from_proto(route.deployment_info)
    try:
        return parse_spec(ApplicationSpec, info.replica_config.init_args[0], source=f"pool {name!r}"), info.version
    except SpecError:
        return None, info.version  # a version of this library with other fields has deployed it
