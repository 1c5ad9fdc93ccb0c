"""The protocol class of Serve's own proxy: uvicorn's, with an end for every wait on a caller.

In the portable profile callers reach that proxy directly, and uvicorn waits without limit for the rest of a head, of a body
and for a reader. Here each has the limits that a replica's own server has (`serve/http/protocol.py`): a head must be complete in time,
bodies and readers must not trickle, a handshake of TLS ends, and what is refused is told so in JSON.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from maas_ray.cluster.node.environment import MAX_ANSWER_S
from maas_ray.display import get_logger
from maas_ray.errors import MaasError, Overloaded
from maas_ray.haproxy.config.answers import HEADER_TIMEOUT_S
from maas_ray.serve.front.reader_speed import ReaderSpeed
from maas_ray.serve.http.raw_head import MAX_HEAD_BYTES, is_sound
from maas_ray.serve.request.response import Reply, error_reply
from maas_ray.serve.spec.pools import LimitsSpec

log = get_logger(__name__)

SWEEP_S = 0.5
CONNECTION = "maas_ray.connection"
"""In the scope of a request: its connection, for who knows the limits of the pool that is asked. To be taken out there."""
_NEW, _IDLE, _HEAD, _BODY, _BUSY, _CLOSED = range(6)


class Door:
    """What all connections of one proxy share.

    Args:
        limits: of requests whose pool is not known yet.
        max_connections: one more is answered 503 and closed.
    """

    def __init__(self, limits: LimitsSpec, max_connections: int) -> None:
        self.limits = limits
        self.max_connections = max_connections
        self.connections: set[ProxyProtocol] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    def opened(self, connection: "ProxyProtocol") -> None:
        """Watches over a connection's times."""
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.connections):
            try:
                connection.check_time(now)
            except Exception as error:  # whatever it is, the others are looked at
                log.warning(
                    "a connection was ended because its times cannot be checked: %s: %s", type(error).__name__, error
                )
                self.connections.discard(connection)
                connection.transport.abort()
        self._sweeper = loop.call_later(SWEEP_S, self._sweep, loop) if self.connections else None


class ProxyProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it; the door comes from the hook."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        door: Door,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = door.limits
        self._door = door
        self._state = _NEW
        self._since = self.loop.time()
        self._received = 0
        self._num_head_bytes = 0
        self._reader: ReaderSpeed = None  # type: ignore[assignment]
        self._closing_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reader = ReaderSpeed(transport)
        door = self._door
        door.opened(self)
        if len(door.connections) > door.max_connections:
            error = Overloaded(f"this proxy has {door.max_connections} connections, which is its limit", 1.0)
            self._refuse(error.http_status, error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self._door.connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._state == _CLOSED:
            return
        if self._state in (_NEW, _IDLE):
            self._enter(_HEAD)
        super().data_received(data)

    def handle_websocket_upgrade(self) -> None:
        self._door.connections.discard(self)  # from here on the connection is another protocol's
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, MaasError("the request is not valid HTTP, or its head is too long"))

    # What the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._num_head_bytes = 0
        self.limits = self._door.limits
        self._enter(_HEAD)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self._state == _HEAD:  # a trailer is no header: it must not change what the head has said
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not is_sound(self.parser.get_http_version(), self.headers):
            raise httptools.HttpParserError("the head is not sound")
        self._enter(_BODY)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._enter(_BUSY)
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:
            self._enter(_IDLE)

    def on_response_complete(self) -> None:
        if self._state == _BUSY and not self.pipeline:
            self._enter(_IDLE)
        super().on_response_complete()

    # What the door calls

    def check_time(self, now: float) -> None:
        """Closes a connection that keeps this process waiting for too long. Called twice a second."""
        allowed_s, passed_s = self.limits.io_timeout_s, now - self._since
        if self._reader.is_stalled(now, allowed_s, self.limits.min_bytes_per_s):
            self.transport.abort()
        elif self.transport.is_closing():
            self._check_end(now, allowed_s)
        elif passed_s <= allowed_s:
            return
        elif self._state == _NEW:
            self.transport.close()
        elif self._state == _HEAD and not self._is_answering():
            self._refuse(408, MaasError(f"the head was not complete within {allowed_s:g} s; send it at once"))
        elif self._state == _BODY:
            self._check_speed(passed_s)

    def _check_end(self, now: float, allowed_s: float) -> None:
        """Nothing more is written: the reader gets what is left, and TLS its last word."""
        if not self._closing_since or self._reader.is_waited_for:
            self._closing_since = now
        elif now - self._closing_since > allowed_s:
            self.transport.abort()

    def _check_speed(self, passed_s: float) -> None:
        received, least = self._received, self.limits.min_bytes_per_s
        # By the speed since the last look, not since the start: who stops after a quick start is seen as well.
        self._enter(_BODY)
        is_waited_for = not self.flow.read_paused and not self.cycle.waiting_for_100_continue
        if is_waited_for and received < passed_s * least:
            text = f"{received} bytes of the body arrived in the last {passed_s:.0f} s; send at least {least} bytes per second"
            self._refuse(408, MaasError(text))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _enter(self, state: int) -> None:
        self._state, self._since, self._received = state, self.loop.time(), 0

    def _count(self, size: int) -> None:
        self._num_head_bytes += size
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError("the head is too long")

    def _refuse(self, status: int, error: MaasError) -> None:
        """Ends the connection with a reply of its own, where none has begun."""
        log.info("connection ended: %s", error)
        is_answered = self._state == _BODY and not self._is_answering()
        self._enter(_CLOSED)
        cycle = self.cycle
        if self._is_answering():
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
            cycle.disconnected = True  # whatever the application still says is not written
            cycle.message_event.set()
        elif is_answered:
            self.transport.close()  # before its body was read
            return
        self.transport.write(_bytes(error_reply(error)._replace(status=status), self.server_state.default_headers))
        self.transport.close()


def with_door(door: Door) -> Callable[..., ProxyProtocol]:
    """What uvicorn is to use as its protocol class."""
    return functools.partial(ProxyProtocol, door=door)


def bound_handshakes(loop: asyncio.AbstractEventLoop, timeout_s: float = HEADER_TIMEOUT_S) -> None:
    """Gives handshakes of TLS an end on servers that this loop starts from now on; uvicorn leaves it at a minute.

    The end of a connection gets more time than the 30 s that it has by default: they include what its reader has not
    received yet, whose speed is the protocol's business.
    """
    create = loop.create_server

    async def create_server(*arguments: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options = {"ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": MAX_ANSWER_S} | options
        return await create(*arguments, **options)

    loop.create_server = create_server  # type: ignore[method-assign]


def _bytes(reply: Reply, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    headers = [*default_headers, *reply.headers, (b"content-length", b"%d" % len(reply.body))]
    headers += [(b"connection", b"close")] if (b"connection", b"close") not in headers else []
    return b"".join([STATUS_LINE[reply.status], *(b"%b: %b\r\n" % each for each in headers), b"\r\n", reply.body])
