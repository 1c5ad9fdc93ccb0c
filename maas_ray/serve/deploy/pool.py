"""Pools on a Ray cluster: deploy, status, undeploy, and the application builder for `serve deploy`."""

from typing import Any

from ray import serve

from maas_ray.serve.deploy.binding import bind
from maas_ray.serve.deploy.front import check_configured_host
from maas_ray.serve.deploy.pools import deploy, undeploy
from maas_ray.serve.deploy.state import PoolStatus, status
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.spec import parse_spec

__all__ = ["PoolStatus", "build", "deploy", "status", "undeploy"]


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder that a Serve config names as `maas_ray.serve:build`.

    Args:
        args: `args` of the application in the config: an `ApplicationSpec`.

    Raises:
        SpecError: the arguments are not valid; Serve shows the message as the application's.
        ClusterError: the fronts of this cluster would not all be reachable.
    """
    check_configured_host()
    return bind(parse_spec(ApplicationSpec, args, source="args"))
