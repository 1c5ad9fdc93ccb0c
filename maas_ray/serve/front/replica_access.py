"""Access to replicas: the addresses on which their HTTP servers listen, and the check that requests passed the front.

Serve has one address for all servers. On several machines only the front listens on it; each replica and each proxy
listens on the address of its node in the cluster, for the fronts of all nodes, and accepts only their requests
(`haproxy.config.secret`).
"""

import hmac
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
import uvicorn

from maas_ray.errors import NotThroughFront
from maas_ray.haproxy.config.secret import HEADER, front_secret
from maas_ray.ray_internals.http_server import use_server
from maas_ray.serve.http.asgi_app import Receive, Scope, Send
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.response import error_reply
from maas_ray.serve.request.url_path import sent_path

_HEALTH = "/-/healthz"
"""Path of HAProxy's health checks, which do not have our header. Its response does not depend on the models."""
_NAME = HEADER.encode()


def refusal() -> NotThroughFront:
    """Returns the error for a request that did not pass the front."""
    return NotThroughFront(
        "this port is only for the cluster's own HTTP front; send the request to the front, on any node, at http.port"
    )


def front_check(environ: Mapping[str, str]) -> Callable[[Iterable[Header]], bool] | None:
    """Returns a function that checks by headers (names in lower case) whether a request passed the front; or None.

    None in the profile `portable`, in which Serve's proxy is the front and replicas have no port.

    Raises:
        OSError: the token of the cluster cannot be read.
    """
    secret = front_secret(environ).encode() if environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else b""
    if not secret:
        return None
    return lambda headers: any(name == _NAME and hmac.compare_digest(value, secret) for name, value in headers)


class FrontOnly:
    """ASGI middleware that refuses requests that did not pass the front, except health checks.

    Args:
        app: wrapped application.
        is_from_front: see `front_check`.
    """

    def __init__(self, app: Any, is_from_front: Callable[[Iterable[Header]], bool]) -> None:
        self._app = app
        self._is_from_front = is_from_front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_from_front(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif sent_path(scope.get("raw_path"), scope["path"]) == _HEALTH:
            await self._app(scope, receive, send)
        else:
            reply = error_reply(refusal())
            headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body)), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})


class NodeServer(uvicorn.Server):
    """uvicorn's server, listening on the addresses of this node instead of the given ones."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(_on_node(sockets or []))


def listen_on_node() -> None:
    """Makes the HTTP servers of this process listen on the node's address and on loopback; called before Serve's start.

    The HAProxy of the node itself uses loopback, those of other nodes the node's address.
    """
    use_server(NodeServer)


def _on_node(sockets: list[socket.socket]) -> list[socket.socket]:
    host = ray.util.get_node_ip_address()
    found: list[socket.socket] = []
    for given in sockets:
        port = int(given.getsockname()[1])
        shares_port = bool(given.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
        given.close()  # Serve bound it to reserve the port; nothing listened on it
        for address in dict.fromkeys((host, "::1" if ":" in host else "127.0.0.1")):
            found.append(bound_socket(address, port, shares_port))
    return found


def bound_socket(address: str, port: int, shares_port: bool) -> socket.socket:
    """A TCP socket bound to an address and port. Raises OSError."""
    sock: Any = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares_port))
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock  # type: ignore[no-any-return]
