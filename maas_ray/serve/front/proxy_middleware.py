"""Middleware of Serve's own proxy: limits its memory for bodies, and answers for pools scaled to zero.

Behind HAProxy that proxy receives the requests of pools without a replica; in the portable profile it receives all.
"""

import asyncio
import time
from typing import Any

from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, MaasError, NotFound, Overloaded
from maas_ray.haproxy.config.answers import MISSING, STARTING
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.ray_internals.serve import describe_here, has_replicas
from maas_ray.ray_internals.serve_servers import proxy_router
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.front.proxy_protocol import CONNECTION, bound_handshakes
from maas_ray.serve.front.sleeping_pools import ANSWERED, Asleep
from maas_ray.serve.http.asgi_app import Message, Receive, Scope, Send
from maas_ray.serve.request.head import Head, read_head
from maas_ray.serve.request.limits import check_size, late_body
from maas_ray.serve.request.response import Reply, error_reply
from maas_ray.serve.spec.pools import ApplicationSpec, ReplicaRange
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store

log = get_logger(__name__)

REMEMBER_S = 2.0
"""Seconds for which the controller's information on a pool is cached; a changed deployment is seen after that."""
ASK_S = 5.0
"""Maximum wait for the controller."""
MAX_BYTES = 256 << 20
"""Maximum bytes of all bodies that wait in this process."""
SERVES_OWN = ("/-/healthz", "/-/routes")


class _HasLeftError(Exception):
    """The client closed the connection in the middle of a body: there is nobody to answer."""


class Doorkeeper:
    """ASGI middleware.

    Args:
        app: Serve's proxy, inside its own middlewares.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._router = proxy_router(app)
        self._pools: dict[Any, tuple[float, ApplicationSpec, Asleep]] = {}
        self._budget = ByteBudget(MAX_BYTES)
        bound_handshakes(asyncio.get_running_loop())  # Serve creates its app in the loop of the server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.pop(CONNECTION, None)  # Serve sends the scope to a replica
        if scope["type"] != "http" or self._router is None or scope["path"] in SERVES_OWN:
            await self._app(scope, receive, send)
            return
        found = self._router.match_route(scope["path"])
        if found is None:
            # Serve sends its 404 in plain text, also before this proxy has its routes.
            is_told, _ = self._router.ready_for_traffic(is_head=True)
            error: MaasError = NotFound(MISSING) if is_told else Overloaded(STARTING, 1.0)
            await _reply(send, scope["method"], error_reply(error))
            return
        identity = self._router.route_info.get(found[0])
        pool = await self._pool(identity) if identity is not None else None
        if pool is None:
            await self._app(scope, receive, send)
            return
        prefix, handle, _ = found
        spec, asleep = pool
        if connection is not None:
            connection.limits = spec.limits
        raw = scope.get("raw_path") or scope["path"].encode()
        path = raw.decode("latin-1").partition("?")[0][len(prefix.rstrip("/")) :]
        head = Head(scope["method"], path or "/", scope["headers"])
        try:
            read_head(head, spec.limits)
            if head.route.name in ANSWERED and _can_sleep(spec) and not has_replicas(handle):
                body = await self._body(head, receive, spec) if head.method == "POST" else b""
                await _reply(send, head.method, await asyncio.to_thread(asleep.answer, head, body))
                return
            await self._pass(scope, head, receive, send, spec)
        except MaasError as error:
            await _reply(send, head.method, error_reply(error, head.reply_headers))
        except _HasLeftError:
            return

    async def _pass(self, scope: Scope, head: Head, receive: Receive, send: Send, spec: ApplicationSpec) -> None:
        """Forwards a request with its whole body, which the proxy would otherwise read without a limit."""
        size = head.content_length or 0
        if head.method == "POST" and head.content_length is None:
            size = spec.limits.max_body_bytes
        if self._budget.used + size > self._budget.limit:
            raise Overloaded(
                f"{self._budget.used} bytes wait in the proxy, this request may have {size}, the limit is "
                f"{self._budget.limit}; retry later"
            )
        self._budget.used += size
        try:
            if head.method == "POST":
                receive = _replay(await self._body(head, receive, spec), receive)
            await self._app(scope, receive, send)
        finally:
            self._budget.used -= size

    async def _body(self, head: Head, receive: Receive, spec: ApplicationSpec) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(head.timeout_s):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    check_size(len(body), spec.limits.max_body_bytes)
                    if message["type"] == "http.disconnect":
                        raise _HasLeftError
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise DeadlineExceeded(late_body(len(body))) from None

    async def _pool(self, identity: Any) -> tuple[ApplicationSpec, Asleep] | None:
        """Returns the spec of an application; None if it is not one of ours, or the controller does not answer."""
        if identity.name not in (REPLAYABLE, NOT_REPLAYABLE):
            return None
        known = self._pools.get(identity)
        if known is None or time.monotonic() > known[0]:
            try:
                spec = await asyncio.wait_for(read_spec(identity), ASK_S)
                asleep = known[2] if known and known[1] == spec else await asyncio.to_thread(_asleep, spec, identity)
                known = (time.monotonic() + REMEMBER_S, spec, asleep)
            except Exception as error:  # in any case: the cached value, or Serve's own behavior
                log.warning("the limits of pool %s are unknown: %s", identity.app_name, type(error).__name__)
                if known is None:
                    return None
            self._pools = {key: value for key, value in self._pools.items() if key in self._router.handles}
            self._pools[identity] = known
        return known[1], known[2]


async def read_spec(identity: Any) -> ApplicationSpec:
    """The spec of the pool to which a deployment belongs, from Serve's controller."""
    found = await describe_here(identity.name, identity.app_name)
    return parse_spec(ApplicationSpec, found.arguments[0], source="application")


def _asleep(spec: ApplicationSpec, identity: Any) -> Asleep:
    return Asleep(open_store(spec.storage), spec, identity.app_name)


def _can_sleep(spec: ApplicationSpec) -> bool:
    return isinstance(spec.replicas, ReplicaRange) and spec.replicas.min == 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that returns a received body, and then further messages, such as a disconnect."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _reply(send: Send, method: str, reply: Reply) -> None:
    headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body))]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else reply.body})
