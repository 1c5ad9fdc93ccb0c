"""Protocol class of Serve's own proxy: uvicorn's, with a time limit for every wait on a client.

In the portable profile clients connect to that proxy directly, and uvicorn waits without limit for the rest of a head,
of a body and for a reader. This class has the limits of a replica's own server (`serve/http/protocol.py`): a head must
be complete in time, bodies and readers have a minimum speed, a TLS handshake ends, and errors are sent as JSON.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from maas_ray.cluster.node.environment import MAX_ANSWER_S
from maas_ray.display import get_logger
from maas_ray.errors import MaasError
from maas_ray.haproxy.config.answers import HEADER_TIMEOUT_S
from maas_ray.serve.front.reader_speed import ReaderSpeed
from maas_ray.serve.http.checked_parser import CheckedHttpProtocol
from maas_ray.serve.http.slow_clients import BodySpeed, late_head, too_many_connections
from maas_ray.serve.request.response import Reply, error_reply
from maas_ray.serve.spec.limits import LimitsSpec

log = get_logger(__name__)

SWEEP_S = 0.5
CONNECTION = "maas_ray.connection"
"""Key of a request's connection in its scope, for the middleware that has the pool's limits and must remove it."""
_NEW, _IDLE, _HEAD, _BODY, _BUSY, _CLOSED = range(6)


class Door:
    """State shared by all connections of one proxy.

    Args:
        limits: limits of requests whose pool is not known yet.
        max_connections: maximum number of connections; further ones get status 503 and are closed.
    """

    def __init__(self, limits: LimitsSpec, max_connections: int) -> None:
        self.limits = limits
        self.max_connections = max_connections
        self.connections: set[ProxyProtocol] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    def opened(self, connection: "ProxyProtocol") -> None:
        """Monitors the time limits of a connection."""
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.connections):
            try:
                connection.check_time(now)
            except Exception as error:  # in any case the others are checked
                log.warning(
                    "a connection was closed because its time limits cannot be checked: %s: %s",
                    type(error).__name__,
                    error,
                )
                self.connections.discard(connection)
                connection.transport.abort()
        self._sweeper = loop.call_later(SWEEP_S, self._sweep, loop) if self.connections else None


class ProxyProtocol(CheckedHttpProtocol):
    """One connection. uvicorn creates it; the door comes from the server hook."""

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
        self._speed = BodySpeed()
        self._reader: ReaderSpeed = None  # type: ignore[assignment]
        self._closing_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reader = ReaderSpeed(transport)
        door = self._door
        door.opened(self)
        if len(door.connections) > door.max_connections:
            error = too_many_connections("this proxy", door.max_connections)
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
        self._door.connections.discard(self)  # from here on another protocol owns the connection
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, MaasError("the request is not valid HTTP, or its head is too long"))

    # Called by the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self.limits = self._door.limits
        self._enter(_HEAD)

    def on_head_accepted(self) -> None:
        self._enter(_BODY)

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

    # Called by the door

    def check_time(self, now: float) -> None:
        """Closes a connection that makes this process wait for too long. Called twice a second."""
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
            self._refuse(408, MaasError(late_head(allowed_s)))
        elif self._state == _BODY:
            self._check_speed(now)

    def _check_end(self, now: float, allowed_s: float) -> None:
        """Called when nothing more is written: flushes data to the reader, then the TLS closure alert."""
        if not self._closing_since or self._reader.is_waited_for:
            self._closing_since = now
        elif now - self._closing_since > allowed_s:
            self.transport.abort()

    def _check_speed(self, now: float) -> None:
        if not self._speed.is_due(now, self.limits):
            return
        problem = self._speed.check(now, self._received, self.limits)
        if problem and not self.flow.read_paused and not self.cycle.waiting_for_100_continue:
            self._refuse(408, MaasError(problem))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _enter(self, state: int) -> None:
        self._state, self._since, self._received = state, self.loop.time(), 0
        self._speed.start(self._since)

    def _refuse(self, status: int, error: MaasError) -> None:
        """Closes the connection, with an error response if none has begun."""
        log.info("connection closed: %s", error)
        is_answered = self._state == _BODY and not self._is_answering()
        self._enter(_CLOSED)
        cycle = self.cycle
        if self._is_answering():
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
            cycle.disconnected = True  # further output of the application is not written
            cycle.message_event.set()
        elif is_answered:
            self.transport.close()  # before its body was read
            return
        self.transport.write(_bytes(error_reply(error)._replace(status=status), self.server_state.default_headers))
        self.transport.close()


def with_door(door: Door) -> Callable[..., ProxyProtocol]:
    """Returns the protocol class for uvicorn."""
    return functools.partial(ProxyProtocol, door=door)


def bound_handshakes(loop: asyncio.AbstractEventLoop, timeout_s: float = HEADER_TIMEOUT_S) -> None:
    """Sets a time limit for TLS handshakes on servers that this loop starts from now on; uvicorn's is a minute.

    The TLS shutdown gets more than the default of 30 s, since it includes data that the reader has not received yet;
    the protocol class checks the reader's speed.
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
