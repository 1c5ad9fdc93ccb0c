"""State shared by all connections of one server: cached heads, first lines of responses, and one timer."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from maas_ray.errors import MaasError
from maas_ray.serve.http.handler import Handler
from maas_ray.serve.http.raw_head import parse_head
from maas_ray.serve.request.head import Head, Header, read_head
from maas_ray.serve.spec.pools import LimitsSpec

MAX_REMEMBERED = 1024
"""Maximum number of cached heads; above it the cache is cleared, which costs each client one parse."""
MAX_REMEMBERED_BYTES = 2048
SWEEP_S = 0.5
"""Seconds between two checks of the time limits of connections."""
BUFFER_BYTES = 256 << 10


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
        self.heads: dict[bytes, Head] = {}
        """Cached heads by their bytes; `head` parses others."""
        self.starts: dict[tuple[int, tuple[Header, ...]], bytes] = {}
        """Cached beginnings of responses, up to the request id; `start` creates others."""
        self.default_headers: list[Header] = []
        """Headers that uvicorn adds to each response; a new list each second, with the new date."""
        self._date = b""
        self.now = 0.0
        """Time on the loop's clock at the last sweep: accurate enough for limits of seconds."""
        self._sweeper: asyncio.TimerHandle | None = None
        # One buffer for all connections: received bytes are consumed before the next read.
        self.buffer = memoryview(bytearray(BUFFER_BYTES))

    def head(self, raw: bytes) -> Head | None:
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
        # A head with an id or a trace is never repeated.
        if not head.given_id and not head.traceparent and len(raw) <= MAX_REMEMBERED_BYTES:
            if len(self.heads) >= MAX_REMEMBERED:
                self.heads.clear()
            self.heads[raw] = head
        return head

    def start(self, status: int, headers: tuple[Header, ...]) -> bytes:
        """Returns the beginning of a response, up to the request id; cached, since a model's responses begin alike."""
        lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), self._date, b"x-request-id: "]
        start = b"".join(lines)
        if len(self.starts) >= MAX_REMEMBERED:
            self.starts.clear()
        self.starts[status, headers] = start
        return start

    def renew_date(self, default_headers: list[Header]) -> None:
        """Copies the `date` header from uvicorn's list."""
        self.default_headers = default_headers
        self.starts.clear()
        self._date = b"".join(b"%b: %b\r\n" % header for header in default_headers if header[0] == b"date")

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
