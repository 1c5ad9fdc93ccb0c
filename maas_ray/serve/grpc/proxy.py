"""Serve's own gRPC proxy: calls that name no application reach a pool of ours, as HAProxy sends them. Knows no message."""

import functools
import sys
from typing import Any

from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE


def route_unnamed() -> None:
    """Makes the proxy of this process send calls without the metadata `application` to a pool of ours that is awake.

    Serve refuses them where there are several applications. Which pool it is does not matter: it passes them on.
    """
    # Not imported, but taken from where it is: a process without a proxy has no calls to route.
    serve = sys.modules.get("ray.serve._private.proxy_router")
    if serve is None or getattr(serve.ProxyRouter.get_handle_for_endpoint, "is_ours", False):
        return
    original = serve.ProxyRouter.get_handle_for_endpoint

    @functools.wraps(original)
    def get_handle(self: Any, target_app_name: str) -> Any:
        return original(self, target_app_name or _first(self))

    get_handle.is_ours = True  # type: ignore[attr-defined]
    serve.ProxyRouter.get_handle_for_endpoint = get_handle


def _first(router: Any) -> str:
    ours = {tag.app_name: handle for tag, handle in router.handles.items() if tag.name in (REPLAYABLE, NOT_REPLAYABLE)}
    awake = sorted(name for name, handle in ours.items() if handle.running_replicas_populated())
    return str((awake or sorted(ours) or [""])[0])
