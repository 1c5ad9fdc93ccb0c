"""What all connections of one server share: the heads that were seen, the replies' first lines, and one timer."""

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
"""Heads that are remembered; past it all are forgotten, which costs each caller one parse."""
MAX_REMEMBERED_BYTES = 2048
SWEEP_S = 0.5
"""How often connections are looked at for their time limits."""
BUFFER_BYTES = 256 << 10


class Connection(Protocol):
    """What the front asks of a connection."""

    loop: asyncio.AbstractEventLoop

    def check_time(self, now: float) -> None:
        """Ends itself if it trickles or rests for too long."""
        ...


class HttpServerState:
    """What all connections of one server share.

    Args:
        handler: the answers.
        limits: of one request and one connection.
        base_path: gives the pool's base path, without a slash at the end; asked once for each new head.
        max_connections: that this process can hold; None: as many as the limits say.
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
        """Whether a head has come through the cluster's front; asked once for each new head."""
        self.connections: set[Connection] = set()
        self.heads: dict[bytes, Head] = {}
        """Heads that were seen before, by their bytes; for one that is not among them there is `head`."""
        self.starts: dict[tuple[int, tuple[Header, ...]], bytes] = {}
        """What replies begin with, up to the request's id; what is not among them, `start` makes."""
        self.default_headers: list[Header] = []
        """What uvicorn adds to each reply; a new list each second, in which the date has moved on."""
        self._date = b""
        self.now = 0.0
        """Time of the loop's clock as the sweep last saw it: fine enough for limits of seconds."""
        self._sweeper: asyncio.TimerHandle | None = None
        # One buffer for all connections: what the kernel puts there is consumed before the next read.
        self.buffer = memoryview(bytearray(BUFFER_BYTES))

    def head(self, raw: bytes) -> Head | None:
        """The head of a request that is answered here; None if it is not, or if it is refused."""
        head = parse_head(raw, self.base_path())
        if head is None or not self.is_from_front(head.headers):
            return None
        try:
            read_head(head, self.limits)
        except MaasError:
            return None  # the ASGI app refuses it, with the same layers
        if head.route.name != "infer" or head.content_length is None or head.content_encoding != b"identity":
            return None
        # An id or a trace makes a head that never comes again.
        if not head.given_id and not head.traceparent and len(raw) <= MAX_REMEMBERED_BYTES:
            if len(self.heads) >= MAX_REMEMBERED:
                self.heads.clear()
            self.heads[raw] = head
        return head

    def start(self, status: int, headers: tuple[Header, ...]) -> bytes:
        """The beginning of a reply, up to the request's id; remembered, since a model's replies begin alike."""
        lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), self._date, b"x-request-id: "]
        start = b"".join(lines)
        if len(self.starts) >= MAX_REMEMBERED:
            self.starts.clear()
        self.starts[status, headers] = start
        return start

    def renew_date(self, default_headers: list[Header]) -> None:
        """Takes the `date` header from uvicorn's list."""
        self.default_headers = default_headers
        self.starts.clear()
        self._date = b"".join(b"%b: %b\r\n" % header for header in default_headers if header[0] == b"date")

    def connected(self, connection: Connection) -> None:
        """Counts a connection and watches over its times."""
        self.connections.add(connection)
        self.now = connection.loop.time()
        stats = self.handler.manager.stats
        stats.connections += 1
        stats.connections_total += 1
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def disconnected(self, connection: Connection) -> None:
        """Forgets a connection."""
        if connection in self.connections:
            self.connections.remove(connection)
            self.handler.manager.stats.connections -= 1

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        # One timer for all: a timer per request would cost more than many requests themselves.
        self.now = now = loop.time()
        for connection in list(self.connections):
            connection.check_time(now)
        self._sweeper = loop.call_later(SWEEP_S, self._sweep, loop) if self.connections else None
