"""State shared by all connections of one server: cached heads, the writer of responses, and one timer."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from maas_ray.errors import MaasError
from maas_ray.serve.http.formats import HttpFormat, format_of
from maas_ray.serve.http.raw_head import parse_head
from maas_ray.serve.http.response_writer import ResponseWriter
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.head import Header, read_head
from maas_ray.serve.spec.limits import LimitsSpec

MAX_REMEMBERED = 1024
"""Maximum number of cached heads; above it the cache is cleared, which costs each client one parse."""
MAX_REMEMBERED_BYTES = 2048
SWEEP_S = 0.5
"""Seconds between two checks of the time limits of connections."""
BUFFER_BYTES = 256 << 10


@dataclass(eq=False, slots=True)
class HotHead:
    """The parts of a head that an inference request needs; several requests may share it."""

    model: str
    version: int | None
    format: HttpFormat
    num_bytes: int
    """Bytes of the body."""
    header_length: int
    """Bytes of JSON before binary tensors; 0: unknown, or none."""
    timeout_s: float
    given_id: bytes
    traceparent: bytes
    accept_encoding: bytes
    cors: tuple[Header, ...]
    closes: bool
    expects_continue: bool


class Connection(Protocol):
    """Interface of a connection."""

    loop: asyncio.AbstractEventLoop

    def check_time(self, now: float) -> None:
        """Closes the connection if it is too slow, or idle for too long."""
        ...


class HttpServerState:
    """State shared by all connections of one server.

    Args:
        handler: request handler.
        limits: limits of one request and one connection.
        base_path: returns the pool's base path, without a trailing slash; called once for each new head.
        max_connections: maximum number in this process; None: as in the limits.
    """

    def __init__(
        self,
        handler: Handler,
        limits: LimitsSpec,
        base_path: Callable[[], str] = lambda: "",
        max_connections: int | None = None,
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.max_connections = limits.max_connections if max_connections is None else max_connections
        self.base_path = base_path
        self.is_from_front: Callable[[Iterable[Header]], bool] = lambda _: True
        """Whether a head has passed the cluster's front; called once for each new head."""
        self.connections: set[Connection] = set()
        self.heads: dict[bytes, HotHead] = {}
        """Cached heads by their bytes; `head` parses others."""
        self.writer = ResponseWriter()
        self.now = 0.0
        """Time on the loop's clock at the last sweep: accurate enough for limits of seconds."""
        self._sweeper: asyncio.TimerHandle | None = None
        # One buffer for all connections: received bytes are consumed before the next read.
        self.buffer = memoryview(bytearray(BUFFER_BYTES))

    def head(self, raw: bytes) -> HotHead | None:
        """Returns the head of a request that is answered here; None if it is not, or if it is refused."""
        head = parse_head(raw, self.base_path())
        if head is None or not self.is_from_front(head.headers):
            return None
        try:
            read_head(head, self.limits)
        except MaasError:
            return None  # the ASGI app refuses it, with the same layers
        if head.route.name != "infer" or head.content_length is None or head.content_encoding != b"identity":
            return None
        found = HotHead(
            model=head.route.model,
            version=head.route.version,
            format=format_of(head),
            num_bytes=head.content_length,
            header_length=head.header_length or 0,
            timeout_s=head.timeout_s,
            given_id=head.given_id,
            traceparent=head.traceparent,
            accept_encoding=head.accept_encoding,
            cors=head.cors,
            closes=head.closes,
            expects_continue=head.expects_continue,
        )
        # A head with an id or a trace is never repeated.
        if not head.given_id and not head.traceparent and len(raw) <= MAX_REMEMBERED_BYTES:
            if len(self.heads) >= MAX_REMEMBERED:
                self.heads.clear()
            self.heads[raw] = found
        return found

    def connected(self, connection: Connection) -> None:
        """Adds a connection, and monitors its time limits."""
        self.connections.add(connection)
        self.now = connection.loop.time()
        stats = self.handler.manager.stats
        stats.connections += 1
        stats.connections_total += 1
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def disconnected(self, connection: Connection) -> None:
        """Removes a connection."""
        if connection in self.connections:
            self.connections.remove(connection)
            self.handler.manager.stats.connections -= 1

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        # One timer for all: a timer per request would cost more than many requests themselves.
        self.now = now = loop.time()
        for connection in list(self.connections):
            connection.check_time(now)
        self._sweeper = loop.call_later(SWEEP_S, self._sweep, loop) if self.connections else None
