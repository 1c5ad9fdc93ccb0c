"""Callers as a client should be: each request has a deadline, and is repeated where that is safe. Judges nothing.

A call is sent with a deadline and repeated under the same id while it may be: after a typed error that allows it (429, 503
and 504 with our JSON), and, if the pool is idempotent, after a broken connection. It ends with an answer, an error that
repeating does not help against, or the end of its caller's patience.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from tests.support.callers import Callers, Connection
from tests.support.ledger import DEADLINE_GRACE_S, NO_ANSWER, Attempt, Call

PATIENCE_S = 20.0
"""A call without an answer after this is given up."""
MORE_S = 4.0
"""How long an attempt is waited for after it is late, so that the ledger can say how late."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
STALL_EVERY_S = 0.02
RETRYABLE = (429, 503, 504)


class PatientCallers(Callers):
    """Callers with deadlines.

    Args:
        port: of the front.
        path: of the infer route.
        deadlines_s: of the attempts; each call takes one of them by chance.
        repeats: False sends everything once: a caller of a pool that is not idempotent cannot know whether the request ran.
        num_callers: see `Callers`.
        pause_s: see `Callers`.
        name: see `Callers`.
        seed: of the choice of deadlines.
    """

    def __init__(
        self,
        port: int,
        path: str,
        deadlines_s: Sequence[float],
        *,
        repeats: bool = True,
        num_callers: int = 8,
        pause_s: float = 0.05,
        name: str = "call",
        seed: int = 0,
    ) -> None:
        super().__init__(port, path, num_callers, pause_s, name)
        self._deadlines_s = deadlines_s
        self._repeats = repeats
        self._more_s = MORE_S
        self.loop: asyncio.AbstractEventLoop
        """In which they run, from their start on."""
        self.longest_stall_s = 0.0
        """Longest time for which this machine kept the callers themselves waiting: so much later they may see an answer."""
        self._random = random.Random(seed)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        watch = asyncio.create_task(self._watch())
        try:
            await super()._run()
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(STALL_EVERY_S)
            self.longest_stall_s = max(self.longest_stall_s, time.monotonic() - began_s - STALL_EVERY_S)

    async def _call(self, connection: Connection, id: str) -> Call:
        deadline_s = self._random.choice(self._deadlines_s)
        header = {"x-request-timeout-ms": str(int(1000 * deadline_s))}
        first_s, attempts, pause_s = time.monotonic(), [], FIRST_PAUSE_S
        while True:
            call = await connection.ask(self._path, id, deadline_s + DEADLINE_GRACE_S + self._more_s, header)
            attempts.append(Attempt(call.sent_s, call.ended_s, deadline_s, call.status))
            wait_s = call.retry_after_s if call.retry_after_s is not None else pause_s
            is_over = call.ended_s + wait_s - first_s > PATIENCE_S
            if is_over or not (self._repeats and may_be_repeated(call)):
                return replace(call, sent_s=first_s, attempts=tuple(attempts))
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def may_be_repeated(call: Call) -> bool:
    """Whether an idempotent request that ended so should be sent again."""
    if call.status == NO_ANSWER:
        return True
    try:
        is_ours = isinstance(json.loads(call.error).get("error"), str)
    except (ValueError, AttributeError):
        return False  # HTML, or whatever: not an error of ours
    return is_ours and call.status in RETRYABLE


def longest_silence_s(calls: Sequence[Call], start_s: float, end_s: float) -> float:
    """The longest time without a right answer to anybody between two moments, in which somebody always waits for one."""
    times = sorted(call.ended_s for call in calls if call.status == 200 and start_s <= call.ended_s <= end_s)
    edges = [start_s, *times, end_s]
    return max(later - earlier for earlier, later in pairwise(edges))
