"""Serve's own gRPC proxy: routes calls without an application name to a pool of ours, as HAProxy does."""

from typing import Any

from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.ray_internals.serve_servers import route_unnamed_calls


def route_unnamed() -> None:
    """Makes the proxy of this process route calls without the metadata `application` to a running pool of ours.

    Serve refuses them if there are several applications. Any pool will do: it forwards them.
    """
    route_unnamed_calls(_first)


def _first(router: Any) -> str:
    ours = {tag.app_name: handle for tag, handle in router.handles.items() if tag.name in (REPLAYABLE, NOT_REPLAYABLE)}
    awake = sorted(name for name, handle in ours.items() if handle.running_replicas_populated())
    return str((awake or sorted(ours) or [""])[0])
