"""The one ASGI app of a replica: HTTP in, HTTP out, in the order of `LAYERS`. Knows neither Ray nor a tensor."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from maas_ray.errors import BadRequest, BodyTooLarge, DeadlineExceeded, MaasError
from maas_ray.serve.handler import Handler, Header, Reply, Route, check_method, error_reply, find_route
from maas_ray.serve.spec import LimitsSpec

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_REQUEST_ID_CHARS = 128
CLIENT_GONE = 499
WATCH_AFTER_S = 0.02
"""A request that has waited this long is watched for its client's leaving; most are answered before, and pay nothing."""


class Exchange:
    """One request on its way through the layers."""

    __slots__ = ("body", "deadline", "handler", "headers", "limits", "method", "receive", "reply_headers", "request_id", "route", "scope", "sends_request_id")  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, handler: Handler, limits: LimitsSpec) -> None:
        self.scope = scope
        self.receive = receive
        self.handler = handler
        self.limits = limits
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = ""
        self.sends_request_id = True
        self.deadline = 0.0
        self.route: Route | None = None
        self.body = b""
        self.reply_headers: tuple[Header, ...] = ()
        """Headers that every reply carries from here on, errors too."""

    @property
    def path(self) -> str:
        """The path below the pool's base path (ASGI: `path` includes `root_path`)."""
        path, root = str(self.scope["path"]), str(self.scope.get("root_path", "")).rstrip("/")
        return path[len(root) :] if root and path.startswith(root) else path


Next = Callable[[Exchange], Awaitable[Reply]]
Layer = Callable[[Exchange, Next], Awaitable[Reply]]


async def request_id(exchange: Exchange, inner: Next) -> Reply:
    """Takes the caller's `x-request-id` or makes one, and sends it back with every reply.

    Behind Serve's own server the id is always there, and Serve sends it back itself.
    """
    given = exchange.headers.get(b"x-request-id", b"")
    is_usable = 0 < len(given) <= MAX_REQUEST_ID_CHARS and all(33 <= byte <= 126 for byte in given)
    exchange.request_id = given.decode() if is_usable else uuid.uuid4().hex
    reply = await inner(exchange)
    if not exchange.sends_request_id:
        return reply
    return reply._replace(headers=(*reply.headers, (b"x-request-id", exchange.request_id.encode())))


async def errors_to_json(exchange: Exchange, inner: Next) -> Reply:
    """Our errors with their status and message; anything else is a 500 that says nothing but its request id."""
    try:
        return await inner(exchange)
    except MaasError as error:
        return error_reply(error, exchange.reply_headers)
    except Exception:
        log.exception("request %s failed in an unexpected way", exchange.request_id)
        failure = MaasError(f"internal error; the replica's log has the cause under request id {exchange.request_id}")
        return error_reply(failure, exchange.reply_headers)


async def route(exchange: Exchange, inner: Next) -> Reply:
    """Finds where the path leads and checks the method, before a byte of the body is read."""
    exchange.route = found = find_route(exchange.path)
    if exchange.method != found.method:
        allowed = b"GET, HEAD" if found.method == "GET" else found.method.encode()
        exchange.reply_headers = ((b"allow", allowed),)
        check_method(found, exchange.method)
    exchange.reply_headers = exchange.handler.model_headers(found)
    return await inner(exchange)


async def deadline(exchange: Exchange, inner: Next) -> Reply:
    """`x-request-timeout-ms`, bounded by the pool's maximum, becomes a time of the loop's clock."""
    timeout_s = exchange.limits.timeout_s
    given = exchange.headers.get(b"x-request-timeout-ms")
    if given is not None:
        if not (given.isdigit() and len(given) <= 12 and int(given) > 0):
            raise BadRequest(f"x-request-timeout-ms {given[:40]!r} is not a positive integer; give milliseconds")
        timeout_s = min(timeout_s, int(given) / 1000)
    exchange.deadline = asyncio.get_running_loop().time() + timeout_s
    return await inner(exchange)


async def body_limit(exchange: Exchange, inner: Next) -> Reply:
    """Reads the body up to the pool's limit; a declared length above it is refused without reading."""
    if exchange.method != "POST":
        return await inner(exchange)
    encoding = exchange.headers.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        raise BadRequest(f"content-encoding {encoding[:40]!r} is not offered; send the body uncompressed")
    if b"inference-header-content-length" in exchange.headers:
        raise BadRequest("the binary tensor extension is not offered here; send data as JSON (binary_data=False)")
    limit = exchange.limits.max_body_bytes
    declared = exchange.headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    body = bytearray()
    try:
        async with asyncio.timeout_at(exchange.deadline):
            while True:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    return Reply(CLIENT_GONE, (), b"")
                body += message.get("body", b"")  # one buffer: a list of a million chunks would cost far more
                if len(body) > limit:
                    raise _too_large(len(body), limit)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise DeadlineExceeded(
            f"only {len(body)} bytes of the body arrived before the request's deadline; send faster or allow more time"
        ) from None
    exchange.body = bytes(body)
    return await inner(exchange)


async def answer(exchange: Exchange, inner: Next) -> Reply:
    """The innermost layer: everything but inference is answered at once; inference waits for its run."""
    found = exchange.route
    if found is None:
        return await inner(exchange)
    if found.name != "infer":
        return exchange.handler.answer(found)
    return await _infer(exchange, found)


LAYERS: tuple[Layer, ...] = (request_id, errors_to_json, route, deadline, body_limit, answer)
"""The order of the world, outermost first."""


async def _infer(exchange: Exchange, found: Route) -> Reply:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Reply] = loop.create_future()

    def done(reply: Reply) -> None:
        if not future.done():
            future.set_result(reply)

    ticket = exchange.handler.infer(found, exchange.body, exchange.deadline, done)
    watchers: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await exchange.receive())["type"] != "http.disconnect":
            continue
        ticket.cancel()
        done(Reply(CLIENT_GONE, (), b""))

    timer = loop.call_later(WATCH_AFTER_S, lambda: watchers.append(loop.create_task(watch())))
    try:
        return await future
    finally:
        # Also when this task is cancelled, which is how Serve tells that the client has gone.
        timer.cancel()
        ticket.cancel()
        for watcher in watchers:
            watcher.cancel()


class App:
    """ASGI 3 application.

    Args:
        handler: the answers.
        limits: of one request.
        sends_request_id: False where the server around this app appends `x-request-id` itself, as Ray Serve's does.
    """

    def __init__(self, handler: Handler, limits: LimitsSpec, *, sends_request_id: bool = True) -> None:
        self._handler = handler
        self._limits = limits
        self._sends_request_id = sends_request_id
        inner: Next = _nowhere
        for layer in reversed(LAYERS):
            inner = _around(layer, inner)
        self._reply = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = Exchange(scope, receive, self._handler, self._limits)
            exchange.sends_request_id = self._sends_request_id
            reply = await self._reply(exchange)
            if reply.status != CLIENT_GONE:
                await _send(reply, send, has_body=exchange.method != "HEAD")
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._handler.residency.start()
                except MaasError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._handler.residency.close(self._limits.drain_timeout_s)
                await send({"type": "lifespan.shutdown.complete"})
                return


def _around(layer: Layer, inner: Next) -> Next:
    return lambda exchange: layer(exchange, inner)


async def _nowhere(exchange: Exchange) -> Reply:
    raise MaasError(f"no layer answered {exchange.method} {exchange.path}")


async def _send(reply: Reply, send: Send, *, has_body: bool) -> None:
    headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body if has_body else b""})


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has at least {size} bytes, the limit is {limit}; send fewer rows per request")
