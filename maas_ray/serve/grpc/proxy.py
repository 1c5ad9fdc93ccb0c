"""Serve's own gRPC proxy: calls that name no application reach a pool of ours, as HAProxy sends them. Knows no message."""

from typing import Any

from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.ray_internals.serve_servers import route_unnamed_calls


def route_unnamed() -> None:
    """Makes the proxy of this process send calls without the metadata `application` to a pool of ours that is awake.

    Serve refuses them where there are several applications. Which pool it is does not matter: it passes them on.
    """
    route_unnamed_calls(_first)


def _first(router: Any) -> str:
    ours = {tag.app_name: handle for tag, handle in router.handles.items() if tag.name in (REPLAYABLE, NOT_REPLAYABLE)}
    awake = sorted(name for name, handle in ours.items() if handle.running_replicas_populated())
    return str((awake or sorted(ours) or [""])[0])
