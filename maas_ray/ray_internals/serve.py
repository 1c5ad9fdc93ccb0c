"""Requests to Serve's controller, and state of Serve's clients, deployments and handles without a public API.

Imports ray.serve. Read in Ray 2.60.0: `ray.serve.context`, its client, the controller's methods.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_LOGGER_NAME, SERVE_NAMESPACE
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.generated.serve_pb2 import DeploymentRoute


@dataclass(frozen=True)
class Description:
    """The arguments and the version with which the replicas of a deployment start."""

    arguments: Sequence[Any]
    version: str | None


def log_only_warnings() -> None:
    """Suppresses the INFO lines of Serve's logger in this process. The import of ray.serve sets its level to INFO."""
    logging.getLogger(SERVE_LOGGER_NAME).setLevel(logging.WARNING)


def running_client() -> Any:
    """Serve's client in this process; None if Serve does not run."""
    return _get_global_client(raise_if_no_controller_running=False)


def forget_client() -> None:
    """Makes the next request of this process look up the controller again, since the known one may be dead."""
    _disconnect()


def http_config() -> Any:
    """Serve's effective HTTP options: a second `serve.start` ignores its options.

    Raises:
        RayServeException: Serve does not run.
    """
    return _get_global_client().http_config


def grpc_config(timeout_s: float) -> Any:
    """Serve's effective gRPC options; see `http_config`."""
    return ray.get(_get_global_client()._controller.get_grpc_config.remote(), timeout=timeout_s)


def details_of_applications(client: Any) -> Mapping[str, Any]:
    """Details of each application, by name, as in Serve's REST API; `serve.status()` has neither routes nor replicas.

    Args:
        client: result of `running_client`.
    """
    found: Mapping[str, Any] = client.get_serve_details()["applications"]
    return found


def describe(client: Any, deployment: str, application: str, timeout_s: float) -> Description:
    """The arguments and the version of a deployment's replicas, for which Serve has no public API.

    Raises:
        KeyError: the deployment does not exist.
    """
    answer = client._controller.get_deployment_info.remote(deployment, application)
    return _read(ray.get(answer, timeout=timeout_s))


async def describe_here(deployment: str, application: str) -> Description:
    """Same as `describe`, on the event loop of one of Serve's actors, which has no client."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return _read(await controller.get_deployment_info.remote(deployment, application))


def _read(answer: bytes) -> Description:
    info = DeploymentInfo.from_proto(DeploymentRoute.FromString(answer).deployment_info)
    return Description(info.replica_config.init_args, info.version)


def version_options(version: str) -> dict[str, object]:
    """Options that set a deployment's version: Serve replaces replicas only if it changes.

    Without a public option Serve generates a new version each time, so that each deployment restarts all replicas.
    """
    return {"version": version, "_internal": True}


def delete_without_waiting(application: str) -> None:
    """Removes an application. The public call waits for its end, up to 60 s, before the next one can be removed."""
    serve.delete(application, _blocking=False)


async def replica_results(response: Any) -> list[Any]:
    """The results of a broadcast through a handle, one for each replica that answered.

    `results_async` returns all results or none: one silent replica would hide the others.
    """
    found: list[Any] = await response._fetch_replica_results_async()
    return found


def has_replicas(handle: Any) -> bool:
    """Whether Serve knows a replica for requests of this handle. The call wakes no replica."""
    router = getattr(handle, "_router", None)
    if router is None:
        return False  # created at the first request
    router = getattr(router, "_asyncio_router", router)
    chosen = router._request_router
    return bool(chosen.curr_replicas if chosen is not None else router._running_replicas)
