"""An open loop: so many requests a second, whatever comes back. Plain sockets and epoll in one thread.

Server and load share the CPUs, and at ten times a server's peak the load is most of the requests of the machine: an
event loop would take 73 microseconds of CPU for each of them where this takes 48 (at 2,200 a second). Due
requests and answers are looked at once a millisecond, so latencies may be that much too long, never too short.
"""

import contextlib
import itertools
import math
import random
import select
import socket
import time
from collections.abc import Iterator, Sequence

from benchmarks.serving.load.client import NO_ANSWER, Answer, read_answer
from benchmarks.serving.load.generator import CHECK_EVERY, Check, Tally

_TICK_S = 0.001
_BURST = 32
"""Most requests sent before answers are read again."""
_RECEIVE_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 1.0


def open_loop(
    host: str,
    port: int,
    requests: Sequence[bytes],
    check: Check,
    *,
    per_s: float,
    seconds: float,
    warm_s: float = 0.0,
    timeout_s: float = 5.0,
    max_connections: int = 2000,
    poisson: bool = True,
    check_every: int = CHECK_EVERY,
) -> Tally:
    """`per_s` requests a second for `warm_s` and then `seconds`, of which the tally tells the rates, at constant or
    (Poisson) random intervals. A request takes an idle connection or opens one; those for which none is left count as
    failed with status -1: raise `max_connections`. Latency counts from the moment a request was due.
    """
    flood = _Flood(host, port, requests, check, max_connections, check_every)
    try:
        return flood.run(
            _schedule(per_s, warm_s + seconds, flood.order if poisson else None), seconds, warm_s, timeout_s
        )
    finally:
        flood.close()


class _Client:
    """One connection, and the request that is under way on it."""

    __slots__ = ("buffer", "due", "index", "is_busy", "sent", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.is_busy = False
        self.index = 0
        self.due = self.sent = 0.0


class _Flood:
    def __init__(
        self, host: str, port: int, requests: Sequence[bytes], check: Check, max_connections: int, check_every: int
    ) -> None:
        self.order = random.Random(1)
        self._address = (host, port)
        self._requests = requests
        self._check = check
        self._max_connections = max_connections
        self._check_every = check_every
        self._tally = Tally()
        self._epoll = select.epoll()
        self._clients: dict[int, _Client] = {}
        self._idle: list[_Client] = []
        self._num_busy = 0
        self._window = (0.0, math.inf)

    def run(self, offsets: Iterator[float], seconds: float, warm_s: float, timeout_s: float) -> Tally:
        tally, clock = self._tally, time.perf_counter
        tally.duration_s = seconds
        begin = now = clock()
        self._window = (begin + warm_s, begin + warm_s + seconds)
        due = begin + next(offsets, math.inf)
        while due < math.inf:
            for _ in range(_BURST):
                if due > now:
                    break
                self._ask(due)
                due = begin + next(offsets, math.inf)
            self._read()
            now = clock()
            if due > now:
                time.sleep(_TICK_S)
                now = clock()
        deadline = max(clock(), self._window[1]) + timeout_s
        while self._num_busy and clock() < deadline:
            self._read()
            time.sleep(_TICK_S)
        tally.unanswered = self._num_busy
        return tally

    def close(self) -> None:
        for client in self._clients.values():
            client.sock.close()
        self._epoll.close()

    def _ask(self, due: float) -> None:
        tally = self._tally
        tally.sent += 1
        if self._idle:
            client = self._idle.pop()
        elif len(self._clients) < self._max_connections:
            try:
                client = self._connect()
            except OSError:
                tally.failed += 1
                tally.statuses[0] += 1
                return
        else:
            tally.failed += 1
            tally.statuses[-1] += 1
            return
        client.index = self.order.randrange(len(self._requests))
        client.is_busy = True
        self._num_busy += 1
        client.due, client.sent = due, time.perf_counter()
        tally.late_s.append(client.sent - due)
        data = self._requests[client.index]
        try:
            num_sent = client.sock.send(data)
        except OSError:
            self._lost(client)
            return
        if num_sent != len(data):
            raise RuntimeError(f"a request of {len(data)} bytes does not fit the buffer of a socket; send smaller ones")

    def _connect(self) -> _Client:
        sock = socket.create_connection(self._address, _CONNECT_TIMEOUT_S)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = self._clients[sock.fileno()] = _Client(sock)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return client

    def _read(self) -> None:
        for number, _ in self._epoll.poll(0):
            client = self._clients.get(number)
            if client is None:
                continue
            try:
                data = client.sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._lost(client)
                continue
            client.buffer = client.buffer + data if client.buffer else data
            if found := read_answer(client.buffer):
                client.buffer = b""
                self._answered(client, *found)

    def _answered(self, client: _Client, answer: Answer, closes: bool) -> None:
        tally = self._tally
        if client.is_busy:
            client.is_busy = False
            self._num_busy -= 1
            checked = tally.statuses[200] % self._check_every == 0
            is_right = not checked or answer.status != 200 or self._check(client.index, answer)
            now = time.perf_counter()
            is_outside = not self._window[0] <= now <= self._window[1]
            tally.count(answer, is_right, now - client.due, now - client.sent, is_outside=is_outside)
        if closes:
            self._forget(client)
        else:
            self._idle.append(client)

    def _lost(self, client: _Client) -> None:
        if client.is_busy:
            self._answered(client, NO_ANSWER, closes=True)
        else:
            self._forget(client)

    def _forget(self, client: _Client) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(client)
        del self._clients[client.sock.fileno()]
        client.sock.close()


def _schedule(per_s: float, seconds: float, order: random.Random | None) -> Iterator[float]:
    """Seconds after the start at which requests are due: random intervals, or (None) equal ones."""
    offset = 0.0
    for index in itertools.count():
        if order is None:
            offset = index / per_s
        if offset >= seconds:
            return
        yield offset
        if order is not None:
            offset += order.expovariate(per_s)
