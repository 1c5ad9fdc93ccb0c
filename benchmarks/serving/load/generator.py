"""A closed loop in one process (so many clients, each waits for its answer), and what is counted of any load."""

import asyncio
import dataclasses
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
    """Length of the window in which answers count for the rates; the load begins before it, if it is to warm up."""
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
    outside: list[float] = field(default_factory=list)
    """Of those right answers that came before the window, or after it: what a full queue still gave."""
    refusals_s: list[float] = field(default_factory=list)
    """Of 503s, from when the request was sent: what the generator itself is late is not the server's."""
    late_s: list[float] = field(default_factory=list)
    """Open loop: how late the generator itself sent."""

    def count(self, answer: Answer, is_right: bool, latency_s: float, since_sent_s: float, *, is_outside: bool) -> None:
        """One answer; `is_outside`: of the window."""
        self.statuses[answer.status] += 1
        if answer.status == 200 and is_right:
            self.right += 1
            self.latencies_s.append(latency_s)
            if is_outside:
                self.outside.append(latency_s)
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
            good_within_s: `goodput_per_s` counts right answers that came this soon after they were due, and within
                the window.
        """
        limit_s = math.inf if good_within_s is None else good_within_s
        good = sum(value <= limit_s for value in self.latencies_s) - sum(value <= limit_s for value in self.outside)
        counts = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.type in ("int", "float", int, float)
        }
        return counts | {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "per_s": (self.right - len(self.outside)) / self.duration_s,
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
    warm_s: float = 0.0,
    timeout_s: float = 10.0,
    check_every: int = CHECK_EVERY,
) -> Tally:
    """`clients` connections, each with one request under way, for `warm_s` and then `seconds`, of which the tally tells
    the rates.
    """
    return run_loop(_closed(host, port, requests, check, clients, seconds, warm_s, timeout_s, check_every))


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
    warm_s: float,
    timeout_s: float,
    check_every: int,
) -> Tally:
    tally, loop, order = Tally(duration_s=seconds), asyncio.get_running_loop(), random.Random(1)
    begin = time.perf_counter() + warm_s
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
            tally.count(answer, is_right, then - now, then - now, is_outside=not begin <= then <= end)
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
        await asyncio.wait_for(finished.wait(), warm_s + seconds + timeout_s)
    except TimeoutError:
        tally.unanswered = waiting
    await _end(connections, keep)
    return tally


async def _end(connections: Sequence[Connection], tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for connection in connections:
        connection.on_answer = None  # whatever still comes is not counted
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.sleep(0)
