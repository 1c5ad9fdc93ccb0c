"""ASGI app of a replica: all HTTP routes, with the layers of `head.LAYERS`. Independent of Ray and of tensors.

The protocol class answers inference before this app is called; without that class, this app sends the same responses.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, MaasError
from maas_ray.serve.http.compressed import compress
from maas_ray.serve.http.formats import format_of
from maas_ray.serve.http.routes import answer
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.head import INFERENCE, Head, Header, new_request_id, read_head
from maas_ray.serve.request.limits import MAX_CONTROL_BYTES, check_size, late_body
from maas_ray.serve.request.offload import Workers
from maas_ray.serve.request.request import Request
from maas_ray.serve.request.response import Reply, error_reply, internal_error
from maas_ray.serve.request.url_path import below, sent_path
from maas_ray.serve.spec.limits import LimitsSpec
from maas_ray.serve.wire.compression import inflate

log = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

WATCH_AFTER_S = 0.02
"""Seconds after which a request is monitored for a disconnect; most are answered earlier, without that cost."""
INLINE_INFLATE_BYTES = 512
"""A longer compressed body is decompressed in a thread."""
MOST_INFLATION = 1032
"""Maximum ratio of a body's decompressed to its compressed size (zlib.net/zlib_tech.html)."""


class _ClientGone(Exception):
    """The client has disconnected."""


class _Pending:
    """Receives the response of one inference request.

    Args:
        accept_encoding: the client's header.
        workers: threads for its compression.
    """

    def __init__(self, accept_encoding: bytes, workers: Workers) -> None:
        self.reply: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        """None: the client has disconnected."""
        self._accept_encoding = accept_encoding
        self._workers = workers

    def send(self, answer: Reply) -> None:
        compress(answer, self._accept_encoding, self._workers, self.end)

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        self.end(error_reply(error, headers))

    def end(self, reply: Reply | None) -> None:
        if not self.reply.done():
            self.reply.set_result(reply)


class App:
    """ASGI 3 application.

    Args:
        handler: request handler.
        limits: limits of one request.
        sends_request_id: False if the server around this app appends `x-request-id` itself, as Ray Serve's does.
    """

    def __init__(self, handler: Handler, limits: LimitsSpec, *, sends_request_id: bool = True) -> None:
        self._handler = handler
        self._limits = limits
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = Head(scope["method"], _path(scope), scope["headers"])
        request_id = b""
        try:
            try:
                read_head(head, self._limits)
            finally:
                request_id = head.given_id or new_request_id()
            head.reply_headers = self._handler.descriptions.headers(head.route.model, head.route.version)
            reply = await self._reply(head, request_id, receive)
        except _ClientGone:
            return
        except MaasError as error:
            reply = error_reply(error, head.reply_headers)
        except Exception:
            log.exception("request %s failed unexpectedly", request_id.decode())
            reply = error_reply(internal_error(request_id), head.reply_headers)
        if head.route.name not in INFERENCE:
            self._handler.manager.stats.answered(head.route.name or "none", reply.status)
        headers = [*reply.headers, *head.cors, (b"content-length", b"%d" % len(reply.body))]
        if self._sends_request_id:
            headers.append((b"x-request-id", request_id))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head.method == "HEAD" else reply.body})

    async def _reply(self, head: Head, request_id: bytes, receive: Receive) -> Reply:
        deadline = asyncio.get_running_loop().time() + head.timeout_s
        body: bytes | memoryview = b""
        if head.method == "POST":
            body = await self._body(head, receive, deadline)
            if head.content_encoding != b"identity":
                body = await self._inflate(head, bytes(body), deadline)
        if head.route.name in INFERENCE:
            return await self._infer(head, request_id, body, receive, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                return await answer(self._handler, head, bytes(body), deadline)
        except TimeoutError:
            raise DeadlineExceeded(f"the response was not ready within {head.timeout_s:g} s; allow more time") from None

    async def _body(self, head: Head, receive: Receive, deadline: float) -> bytes | memoryview:
        limit = self._limits.max_body_bytes
        if head.route.name not in INFERENCE:
            limit = min(limit, MAX_CONTROL_BYTES)
        body, counted = bytearray(), 0
        budget = self._handler.manager.budget
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    expected = max(len(body), head.content_length or 0)
                    check_size(expected, limit)
                    budget.expect(expected - counted, expected)
                    counted = expected
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    body += message.get("body", b"")  # one buffer: a list of a million chunks would cost far more
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise DeadlineExceeded(late_body(len(body))) from None
        finally:
            budget.arrived(counted)
        check_size(len(body), limit)
        return bytes(body) if len(body) <= MAX_CONTROL_BYTES else memoryview(body)

    async def _inflate(self, head: Head, body: bytes, deadline: float) -> bytes:
        limit = self._limits.max_body_bytes
        if len(body) <= INLINE_INFLATE_BYTES:
            return inflate(body, head.content_encoding, limit)
        num_bytes = min(limit, MOST_INFLATION * len(body))
        try:
            async with asyncio.timeout_at(deadline):
                return await self._handler.workers.run(
                    lambda stop: inflate(body, head.content_encoding, limit), num_bytes
                )
        except TimeoutError:
            raise DeadlineExceeded("decompressing the body exceeded the request's deadline; allow more time") from None

    async def _infer(
        self, head: Head, request_id: bytes, body: bytes | memoryview, receive: Receive, deadline: float
    ) -> Reply:
        pending = _Pending(head.accept_encoding, self._handler.workers)
        route, traceparent = head.route, head.traceparent
        call = self._handler.infer(
            Request(route.model, route.version, body, len(body), deadline, request_id, traceparent, format_of(head)),
            pending,
        )
        watchers: list[asyncio.Task[None]] = []

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue
            pending.end(None)

        loop = asyncio.get_running_loop()
        timer = loop.call_later(WATCH_AFTER_S, lambda: watchers.append(loop.create_task(watch())))
        try:
            reply = await pending.reply
        finally:
            # Also when this task is cancelled, which is how Serve signals that the client has disconnected.
            timer.cancel()
            call.cancel()
            for watcher in watchers:
                watcher.cancel()
        if reply is None:
            raise _ClientGone
        return reply

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._handler.manager.start()
                except MaasError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._handler.close(self._limits.drain_s)
                await send({"type": "lifespan.shutdown.complete"})
                return


def _path(scope: Scope) -> str:
    """Returns the path below the pool's base path, as it was sent (ASGI: paths include `root_path`)."""
    return below(str(scope.get("root_path", "")).rstrip("/"), sent_path(scope.get("raw_path"), str(scope["path"])))
