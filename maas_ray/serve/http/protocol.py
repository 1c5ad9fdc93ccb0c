"""Protocol class of a replica's own HTTP server: answers inference here, before an ASGI scope is built.

    bytes → head (cached) → body → Request → Call → response
    anything else → uvicorn's own protocol (asgi_fallback.py) → the ASGI app, with the same layers and responses

A head that was seen before costs one look-up: clients repeat the same few bytes, so parsed heads are cached by these
bytes (server_state.py). For both paths this class enforces: size and time limits of heads, bodies and readers,
back-pressure in both directions, pipelined requests answered in order, 100-continue, keep-alive, a connection limit,
and a graceful stop that answers started requests.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.http.asgi_fallback import AsgiFallback
from maas_ray.serve.http.back_pressure import ReadingSide, WriteBacklog
from maas_ray.serve.http.compressed import compress
from maas_ray.serve.http.formats import Body
from maas_ray.serve.http.incoming_body import IncomingBody
from maas_ray.serve.http.raw_head import MAX_HEAD_BYTES, is_hopeless, refusal
from maas_ray.serve.http.server_state import HotHead, HttpServerState
from maas_ray.serve.http.slow_clients import BodySpeed, late_head, too_many_connections
from maas_ray.serve.request.call import Call
from maas_ray.serve.request.head import Header, new_request_id
from maas_ray.serve.request.limits import late_body
from maas_ray.serve.request.request import Request
from maas_ray.serve.request.response import Reply, error_reply

log = get_logger(__name__)

MAX_PENDING_BYTES = 64 << 10
"""Bytes of later requests that are buffered while one is answered; then reading pauses until it is."""

_END = b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_IDLE, _BODY, _BUSY, _COLD, _CLOSED = range(5)


class HttpProtocol(asyncio.BufferedProtocol):
    """One connection. uvicorn creates it; `HttpServerState` comes from the code that started the server.

    Args:
        shared: state shared by all connections.
        config: uvicorn's configuration.
        server_state: uvicorn's state; a stop asks every connection in it to end.
        app_state: uvicorn's application state.
    """

    __slots__ = (
        "_backlog", "_body", "_call", "_closing", "_deadline", "_fallback", "_head", "_head_since", "_id",
        "_pending", "_reading", "_shared", "_since", "_speed", "_state", "loop", "server_state", "transport",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: HttpServerState,
    ) -> None:
        self.loop = _loop or asyncio.get_running_loop()
        self.server_state = server_state
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self._shared = shared
        self._state = _IDLE
        self._pending = b""
        self._head: HotHead = None  # type: ignore[assignment]
        self._id = b""
        self._body: IncomingBody | None = None
        self._deadline = 0.0
        self._call: Call[Body, Reply] | None = None
        self._fallback = AsgiFallback(self, config, server_state, app_state)
        self._closing = False
        self._reading = ReadingSide()
        self._since = self.loop.time()
        self._head_since = 0.0
        self._speed = BodySpeed()
        self._backlog = WriteBacklog()

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        shared = self._shared
        if len(shared.connections) >= shared.max_connections:
            self._closing = True
            self._id = new_request_id()
            self._write(error_reply(too_many_connections("this replica", len(shared.connections))))
            return
        self.server_state.connections.add(self)  # type: ignore[arg-type]
        shared.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self._shared.disconnected(self)
        self.server_state.connections.discard(self)
        if self._call is not None:
            self._call.cancel()
            self._call = None
        self._fallback.lost(exc)
        self._forget_body()
        self._pending = b""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._shared.buffer if self._body is None else self._body.rest

    def buffer_updated(self, nbytes: int) -> None:
        if self._body is not None:
            body = self._body.add(nbytes)
            if body is not None:
                self._forget_body()
                self._infer(body, self._deadline)
                self._go_on()
            return
        data = bytes(self._shared.buffer[:nbytes])
        if self._state == _IDLE and not self._pending:
            self._begin(data)
            if len(self._pending):
                self._go_on()
        elif self._state == _COLD:
            self._feed_cold(data)
        elif self._state != _CLOSED:
            self._pending += data
            if self._state == _IDLE:
                self._go_on()
            elif len(self._pending) > MAX_PENDING_BYTES:
                self._reading.pause(self.transport)

    def eof_received(self) -> bool:
        """Whether the transport stays open although no more data is received.

        A client that closes only its sending side cannot be distinguished from one that has disconnected. Inference
        that may be unwanted would take the time of others, so it is cancelled; a GET is short, and its write will tell.
        """
        is_read = self._state == _COLD and self._fallback.only_reads
        is_between = self._state == _IDLE and bool(self._pending) and not self._head_since  # one after a read
        self._reading.has_ended = is_read or is_between
        return self._reading.has_ended

    def pause_writing(self) -> None:
        self._backlog.start(self.loop.time(), self.transport.get_write_buffer_size())
        self._fallback.pause_writing()

    def resume_writing(self) -> None:
        self._backlog.end()
        self._fallback.resume_writing()
        if self._state == _IDLE and self._pending:
            self._go_on()

    # Called by uvicorn's server and the shared state

    def shutdown(self) -> None:
        """Closes the connection once started requests are answered."""
        self._closing = True
        if self._state == _IDLE:
            self.transport.close()
        elif self._state == _COLD:
            self._fallback.shutdown()

    def check_time(self, now: float) -> None:
        """Closes a connection that is too slow, or idle for too long. Called twice a second."""
        limits = self._shared.limits
        if self._backlog.is_waiting:
            if self._backlog.is_stuck(now, self.transport.get_write_buffer_size(), limits):
                self.transport.abort()
        elif self._state == _IDLE:
            if self._reading.has_ended:
                self.transport.close()
            elif self._head_since:
                if now - self._head_since > limits.io_timeout_s:
                    self._refuse(408, late_head(limits.io_timeout_s))
            elif now - self._since > limits.idle_timeout_s:
                self.transport.close()
        elif self._body is not None:
            if now > self._deadline:
                self._refuse(DeadlineExceeded.http_status, late_body(self._body.received))
            # The bytes of a slow client are counted from here, for the next check.
            elif self._speed.is_due(now, limits) and not self._body.wake_always():
                self._check_speed(now, self._body.received)
        elif self._state == _COLD and self._fallback.is_reading and self._speed.is_due(now, limits):
            self._check_speed(now, self._fallback.received)

    def _check_speed(self, now: float, received: int) -> None:
        problem = self._speed.check(now, received, self._shared.limits)
        if problem:
            self._refuse(408, problem)

    def cold_is_done(self) -> None:
        """Called when the message of uvicorn's protocol is complete and answered."""
        if self._state == _COLD:
            self._state = _IDLE
            self._since = self.loop.time()
            if self._closing or (self._reading.has_ended and not self._pending):
                self.transport.close()
            elif self._pending:
                # Not from inside the parser, whose callback this is.
                self.loop.call_soon(self._go_on)
            self._reading.resume(self.transport)

    # Life cycle of a request

    def _go_on(self) -> None:
        while self._pending and self._state == _IDLE and not self.transport.is_closing():
            if self._backlog.is_waiting:
                self._reading.pause(self.transport)  # a client that does not read its responses gets no new ones
                return
            data, self._pending = self._pending, b""
            size = len(data)
            self._begin(data)
            if self._state == _IDLE and len(self._pending) == size:
                return  # no message was complete

    def _begin(self, data: bytes) -> None:
        """Reads the first bytes of a message; the bytes after its head become pending."""
        end = data.find(_END) + len(_END)
        if end < len(_END):
            if len(data) > MAX_HEAD_BYTES:
                self._refuse(431, f"the head has more than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers")
            elif is_hopeless(data):
                self._begin_cold(data, len(data))  # the parser reports it immediately
            else:
                self._pending = data
                self._head_since = self._head_since or self.loop.time()
            return
        self._head_since = 0.0
        raw = data[:end]
        head = self._shared.heads.get(raw) or (self._shared.head(raw) if end <= MAX_HEAD_BYTES else None)
        if head is None:
            if refused := refusal(data, end):
                self._refuse(*refused)
            else:
                self._begin_cold(data, end)
            return
        self._head = head
        size = head.num_bytes
        received = len(data) - end
        if received >= size:
            if received > size:
                self._pending = data[end + size :]
            self._infer(data[end : end + size], self.loop.time() + head.timeout_s)
        else:
            self._begin_body(memoryview(data)[end:])

    def _begin_body(self, received: memoryview) -> None:
        head, budget = self._head, self._shared.handler.manager.budget
        try:
            self._body = body = IncomingBody(head.num_bytes, head.header_length, received, self.transport, budget)
        except Overloaded as error:
            self._refuse(error.http_status, str(error), error)
            return
        if head.expects_continue:
            self.transport.write(_CONTINUE)
        self._state = _BODY
        now = self.loop.time()
        self._deadline = now + head.timeout_s
        self._speed.start(now)
        body.wake_rarely()

    def _forget_body(self) -> None:
        """Called when the body is complete, or will never be."""
        if self._body is not None:
            self._body.release()
            self._body = None

    def _infer(self, body: Body, deadline: float) -> None:
        head = self._head
        self._state = _BUSY
        if head.closes:
            self._closing = True
        self._id = request_id = head.given_id or new_request_id()
        # Same as Request(...), which is a Python function.
        request: Request[Body, Reply] = tuple.__new__(Request, (
            head.model, head.version, body, len(body), deadline, request_id, head.traceparent, head.format,
        ))  # fmt: skip
        self._call = call = Call(self._shared.handler, request, self)
        call.start()

    def send(self, answer: Reply) -> None:
        """Sends the response of an inference request."""
        if accept_encoding := self._head.accept_encoding:
            compress(answer, accept_encoding, self._shared.handler.workers, self._answer)
        else:
            self._answer(answer)

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        """Sends the error of an inference request."""
        self._answer(error_reply(error, headers))

    def _answer(self, reply: Reply) -> None:
        self._call = None
        if self._state == _CLOSED:
            return
        self._state = _IDLE
        self._since = self._shared.now
        if cors := self._head.cors:
            reply = Reply(reply.status, (*reply.headers, *cors), reply.body)
        self._write(reply)
        if self._pending or self._reading.is_paused:
            self._reading.resume(self.transport)
            self.loop.call_soon(self._go_on)

    def _write(self, reply: Reply) -> None:
        closes = self._shared.writer.write(
            self.transport, reply, self._id, self.server_state.default_headers, self._closing
        )
        if closes:
            self.transport.close()

    def _refuse(self, status: int, message: str, error: MaasError | None = None) -> None:
        """Closes the connection with a separate response, for data that cannot be answered otherwise."""
        if self._state == _COLD and self._fallback.has_begun_response:
            self.transport.abort()
            return
        log.info("connection closed: %s", message)
        self._closing = True
        self._id = new_request_id()
        self._write(error_reply(error or MaasError(message))._replace(status=status))
        self._forget_body()
        self._pending, self._state = b"", _CLOSED

    # Requests for the ASGI app

    def _begin_cold(self, data: bytes, end: int) -> None:
        self._state = _COLD
        self._since = now = self.loop.time()
        self._speed.start(now)
        message, self._pending = self._fallback.begin(data, end)
        self._feed_cold(message)

    def _feed_cold(self, data: bytes) -> None:
        if not self._fallback.feed(data) and self._state == _COLD and not self.transport.is_closing():
            self._state = _IDLE  # no message has begun: only blank lines
