"""Server hook: replaces the HTTP server of a replica by ours, before Serve's per-request wrapper.

Serve calls `middlewares` in each process that starts an HTTP server (named by
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`): a replica of ours, another application's replica, or a proxy. In a replica
of ours it installs our protocol class in uvicorn and our ASGI app in front of Serve's; in a proxy, a protocol class
that limits slow clients, and the doorkeeper; in another application's replica it changes nothing.
"""

import functools
import os
from typing import Any

import ray
from starlette.middleware import Middleware

from maas_ray.ray_internals.http_server import use_protocol
from maas_ray.ray_internals.serve_servers import base_path_of
from maas_ray.serve.front.haproxy_limits import follow
from maas_ray.serve.front.replica_access import FrontOnly, front_check, listen_on_node
from maas_ray.serve.grpc.exposure import listen_on_node_only, open_no_internal_port
from maas_ray.serve.http.asgi_app import App, Receive, Scope, Send
from maas_ray.serve.http.protocol import HttpProtocol
from maas_ray.serve.http.server_state import HttpServerState
from maas_ray.serve.replica.connection_limit import allowed_connections
from maas_ray.serve.request.url_path import sent_path
from maas_ray.serve.spec.limits import LimitsSpec

_SERVES_OWN = ("/-/healthz", "/-/routes")
_registered: list[tuple[App, HttpServerState]] = []


def register(app: App, shared: HttpServerState) -> None:
    """Marks this process as a replica of ours; called once, before Serve starts the server."""
    _registered[:] = [(app, shared)]
    open_no_internal_port()  # here too: in the portable profile Serve does not call `middlewares` in replicas


def middlewares() -> list[Middleware]:
    """Returns the middlewares for Serve; empty in replicas that are not ours."""
    listen_on_node()
    listen_on_node_only()
    open_no_internal_port()
    follow()
    is_from_front = front_check(os.environ)
    outermost = [Middleware(FrontOnly, is_from_front=is_from_front)] if is_from_front is not None else []
    if not _registered:
        return [*_before_proxy(), *outermost]
    app, shared = _registered[0]
    if is_from_front is not None:
        shared.is_from_front = is_from_front
    use_protocol(functools.partial(HttpProtocol, shared=shared))
    return [Middleware(_BeforeServe, ours=app, shared=shared), *outermost]


def before_proxy() -> list[Middleware]:
    """As `middlewares`, in the portable profile, in which Serve calls it only in proxies."""
    listen_on_node_only()
    return _before_proxy()


def _before_proxy() -> list[Middleware]:
    """Returns the middlewares of Serve's proxy; empty in another application's replica."""
    if (ray.get_runtime_context().get_actor_name() or "").startswith("SERVE_REPLICA::"):
        return []
    from maas_ray.serve.front.proxy_middleware import Doorkeeper  # only proxies need this module
    from maas_ray.serve.front.proxy_protocol import Door, with_door

    limits = LimitsSpec()
    door = Door(limits, allowed_connections(limits.max_connections, "Serve's proxy of this node"))
    use_protocol(with_door(door))
    return [Middleware(Doorkeeper)]


class _BeforeServe:
    """Routes Serve's own paths (health, routes) to Serve's app, and all others to ours, which sends the only 404."""

    def __init__(self, app: Any, ours: App, shared: HttpServerState) -> None:
        self._serves = app
        self._ours = ours
        self._base_path = base_path_of(app)
        shared.base_path = self._base_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and sent_path(scope.get("raw_path"), scope["path"]) not in _SERVES_OWN:
            scope["root_path"] = self._base_path()
            await self._ours(scope, receive, send)
        else:
            await self._serves(scope, receive, send)
