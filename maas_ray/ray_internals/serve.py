"""Serve's controller as others ask it, and what Serve's public functions and handles keep to themselves.

Imports ray.serve. Read in Ray 2.60.0: `ray.serve.context`, the client that it keeps, the controller's own methods.
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
    """A deployment, as its replicas are started with it."""

    arguments: Sequence[Any]
    version: str | None


def log_only_warnings() -> None:
    """Suppresses the INFO lines of Serve's logger in this process. The import of ray.serve sets its level to INFO."""
    logging.getLogger(SERVE_LOGGER_NAME).setLevel(logging.WARNING)


def running_client() -> Any:
    """Serve's client of this process; None where Serve does not run."""
    return _get_global_client(raise_if_no_controller_running=False)


def forget_client() -> None:
    """Has the next question of this process look for the controller anew, as the known one may be dead."""
    _disconnect()


def http_config() -> Any:
    """Serve's HTTP options as they are in force: a second `serve.start` ignores the options that it is given.

    Raises:
        RayServeException: Serve does not run.
    """
    return _get_global_client().http_config


def grpc_config(timeout_s: float) -> Any:
    """Serve's gRPC options as they are in force; see `http_config`."""
    return ray.get(_get_global_client()._controller.get_grpc_config.remote(), timeout=timeout_s)


def details_of_applications(client: Any) -> Mapping[str, Any]:
    """What Serve's REST API tells of each application, by name; `serve.status()` has neither routes nor replicas.

    Args:
        client: from `running_client`.
    """
    found: Mapping[str, Any] = client.get_serve_details()["applications"]
    return found


def describe(client: Any, deployment: str, application: str, timeout_s: float) -> Description:
    """What the replicas of a deployment are started with, which Serve tells nobody publicly.

    Raises:
        KeyError: there is no such deployment.
    """
    answer = client._controller.get_deployment_info.remote(deployment, application)
    return _read(ray.get(answer, timeout=timeout_s))


async def describe_here(deployment: str, application: str) -> Description:
    """As `describe`, on the loop of an actor of Serve's, which has no client."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return _read(await controller.get_deployment_info.remote(deployment, application))


def _read(answer: bytes) -> Description:
    info = DeploymentInfo.from_proto(DeploymentRoute.FromString(answer).deployment_info)
    return Description(info.replica_config.init_args, info.version)


def version_options(version: str) -> dict[str, object]:
    """Options of a deployment that give it a version of ours: Serve replaces replicas when it changes, and only then.

    Publicly Serve takes no version and makes a new one up each time, so that deploying the same again restarts all.
    """
    return {"version": version, "_internal": True}


def delete_without_waiting(application: str) -> None:
    """Has Serve remove an application. The public call waits for the end of each, up to 60 s, before the next begins."""
    serve.delete(application, _blocking=False)


async def replica_results(response: Any) -> list[Any]:
    """One result for each replica that a broadcast through a handle has reached.

    `results_async` gives all answers or none: one silent replica would hide the others.
    """
    found: list[Any] = await response._fetch_replica_results_async()
    return found


def has_replicas(handle: Any) -> bool:
    """Whether Serve knows a replica that it would send a request of this handle to. Asking wakes none."""
    router = getattr(handle, "_router", None)
    if router is None:
        return False  # never asked for: the first request makes it
    router = getattr(router, "_asyncio_router", router)
    chosen = router._request_router
    return bool(chosen.curr_replicas if chosen is not None else router._running_replicas)
