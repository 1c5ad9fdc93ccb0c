"""A load generator in one process: closed loop (so many clients, each waits for its answer) or open loop (so many
requests per second, whatever comes back). Every answer is checked against the right one.

Latency in the open loop counts from the moment a request was due, so that a server that stalls does not hide it.
"""

import asyncio
import dataclasses
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.serving.load.client import Answer, Connection

try:
    from uvloop import run as run_loop
except ImportError:
    run_loop = asyncio.run

Check = Callable[[int, Answer], bool]
"""Whether the answer to the request of that index is right."""
CHECK_EVERY = 8
"""One answer in so many is compared number by number; more would slow the generator down."""


@dataclass
class Tally:
    """What came back."""

    duration_s: float = 0.0
    sent: int = 0
    right: int = 0
    """Answered 200 (and, where compared, with the right numbers)."""
    wrong: int = 0
    """Answered 200 with other numbers than asked for."""
    refused: int = 0
    """Answered 503 with Retry-After."""
    refused_bare: int = 0
    """Answered 503 without Retry-After."""
    failed: int = 0
    """Any other status, or a broken connection."""
    unanswered: int = 0
    """No answer when the run was over."""
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    """Of right answers."""
    after_end: list[float] = field(default_factory=list)
    """Of those right answers that came after the last request was due: what a full queue still gave."""
    refusals_s: list[float] = field(default_factory=list)
    """Of 503s, from when the request was sent: what the generator itself is late is not the server's."""
    late_s: list[float] = field(default_factory=list)
    """Open loop: how late the generator itself sent."""

    def count(self, answer: Answer, is_right: bool, latency_s: float, since_sent_s: float, *, is_over: bool) -> None:
        """One answer; `is_over`: it came after the run."""
        self.statuses[answer.status] += 1
        if answer.status == 200 and is_right:
            self.right += 1
            self.latencies_s.append(latency_s)
            if is_over:
                self.after_end.append(latency_s)
        elif answer.status == 200:
            self.wrong += 1
        elif answer.status == 503:
            self.refusals_s.append(since_sent_s)
            if b"\r\nretry-after:" in answer.head.lower():
                self.refused += 1
            else:
                self.refused_bare += 1
        else:
            self.failed += 1

    def figures(self, good_within_s: float | None = None) -> dict[str, object]:
        """Plain values.

        Args:
            good_within_s: `goodput_per_s` counts right answers that came this soon after they were due, and before
                the run was over.
        """
        limit_s = math.inf if good_within_s is None else good_within_s
        good = sum(value <= limit_s for value in self.latencies_s) - sum(value <= limit_s for value in self.after_end)
        counts = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.type in ("int", "float", int, float)
        }
        return counts | {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "per_s": (self.right - len(self.after_end)) / self.duration_s,
            "goodput_per_s": good / self.duration_s,
            "p50_s": quantile(self.latencies_s, 0.5),
            "p90_s": quantile(self.latencies_s, 0.9),
            "p99_s": quantile(self.latencies_s, 0.99),
            "refusal_p50_s": quantile(self.refusals_s, 0.5),
            "refusal_p99_s": quantile(self.refusals_s, 0.99),
            "refused_within_50_ms": _share(self.refusals_s, 0.05),
            "late_p99_s": quantile(self.late_s, 0.99),
        }


def closed(
    host: str,
    port: int,
    requests: Sequence[bytes],
    check: Check,
    *,
    clients: int,
    seconds: float,
    timeout_s: float = 10.0,
    check_every: int = CHECK_EVERY,
) -> Tally:
    """`clients` connections, each with one request under way, for `seconds`."""
    return run_loop(_closed(host, port, requests, check, clients, seconds, timeout_s, check_every))


def open_loop(
    host: str,
    port: int,
    requests: Sequence[bytes],
    check: Check,
    *,
    per_s: float,
    seconds: float,
    timeout_s: float = 5.0,
    max_connections: int = 2000,
    poisson: bool = True,
    check_every: int = CHECK_EVERY,
) -> Tally:
    """`per_s` requests a second for `seconds`, at constant or (Poisson) random intervals; a request takes an idle
    connection or opens one. Those for which none is left count as failed with status -1: raise `max_connections`.
    """
    return run_loop(
        _open(host, port, requests, check, per_s, seconds, timeout_s, max_connections, poisson, check_every)
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of them lie; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _share(values: Sequence[float], below: float) -> float | None:
    return sum(value <= below for value in values) / len(values) if values else None


async def _closed(
    host: str,
    port: int,
    requests: Sequence[bytes],
    check: Check,
    clients: int,
    seconds: float,
    timeout_s: float,
    check_every: int,
) -> Tally:
    tally, loop, order = Tally(), asyncio.get_running_loop(), random.Random(1)
    begin = time.perf_counter()
    end = begin + seconds
    finished = asyncio.Event()
    waiting = clients

    async def reopen() -> None:
        try:
            _, fresh = await loop.create_connection(Connection, host, port)
        except OSError:
            tally.failed += 1
            stop()
            return
        connections.append(fresh)
        ask(fresh)

    def stop() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0:
            finished.set()

    def ask(connection: Connection) -> None:
        now = time.perf_counter()
        if now >= end:
            stop()
            return
        index = order.randrange(len(requests))
        tally.sent += 1

        def answered(answer: Answer) -> None:
            then = time.perf_counter()
            checked = tally.sent % check_every == 0
            is_right = not checked or answer.status != 200 or check(index, answer)
            tally.count(answer, is_right, then - now, then - now, is_over=then > end)
            if connection.is_open:
                ask(connection)
            else:
                keep.add(task := loop.create_task(reopen()))
                task.add_done_callback(keep.discard)

        connection.send(requests[index], answered)

    keep: set[asyncio.Task[None]] = set()
    connections = [(await loop.create_connection(Connection, host, port))[1] for _ in range(clients)]
    for connection in connections:
        ask(connection)
    try:
        await asyncio.wait_for(finished.wait(), seconds + timeout_s)
    except TimeoutError:
        tally.unanswered = waiting
    tally.duration_s = time.perf_counter() - begin
    await _end(connections, keep)
    return tally


async def _open(
    host: str,
    port: int,
    requests: Sequence[bytes],
    check: Check,
    per_s: float,
    seconds: float,
    timeout_s: float,
    max_connections: int,
    poisson: bool,
    check_every: int,
) -> Tally:
    tally, loop, order = Tally(), asyncio.get_running_loop(), random.Random(1)
    idle: list[Connection] = []
    everyone: list[Connection] = []
    opening = 0
    pending = 0
    keep: set[asyncio.Task[None]] = set()
    finished = asyncio.Event()

    def ask(connection: Connection, due: float) -> None:
        nonlocal pending
        pending += 1
        index = order.randrange(len(requests))
        sent = time.perf_counter()
        tally.late_s.append(sent - due)

        def answered(answer: Answer) -> None:
            nonlocal pending
            pending -= 1
            checked = tally.statuses[200] % check_every == 0
            is_right = not checked or answer.status != 200 or check(index, answer)
            now = time.perf_counter()
            tally.count(answer, is_right, now - due, now - sent, is_over=now > begin + seconds)
            if connection.is_open:
                idle.append(connection)
            finished.set()

        connection.send(requests[index], answered)

    async def open_and_ask(due: float) -> None:
        nonlocal opening
        try:
            _, connection = await loop.create_connection(Connection, host, port)
        except OSError:
            tally.failed += 1
            tally.statuses[0] += 1
            return
        finally:
            opening -= 1
        everyone.append(connection)
        ask(connection, due)

    begin = time.perf_counter()
    for offset in _schedule(per_s, seconds, order if poisson else None):
        due = begin + offset
        if due > time.perf_counter():
            await asyncio.sleep(due - time.perf_counter())
        elif tally.sent % 8 == 0:
            await asyncio.sleep(0)  # late: answers must be read all the same
        tally.sent += 1
        while idle and not idle[-1].is_open:
            idle.pop()
        if idle:
            ask(idle.pop(), due)
        elif len(everyone) + opening < max_connections:
            opening += 1
            keep.add(task := loop.create_task(open_and_ask(due)))
            task.add_done_callback(keep.discard)
        else:
            tally.failed += 1
            tally.statuses[-1] += 1
    tally.duration_s = time.perf_counter() - begin
    deadline = time.perf_counter() + timeout_s
    while (pending or opening) and time.perf_counter() < deadline:
        finished.clear()
        try:
            await asyncio.wait_for(finished.wait(), 0.1)
        except TimeoutError:
            continue
    tally.unanswered = pending + opening
    await _end(everyone, keep)
    return tally


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


async def _end(connections: Sequence[Connection], tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for connection in connections:
        connection.on_answer = None  # whatever still comes is not counted
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.sleep(0)
