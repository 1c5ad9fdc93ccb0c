"""Patient callers that ask at a steady rate, whatever becomes of earlier requests, through a load balancer."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType

from tests.support.balancer import Balancer
from tests.support.callers import Connection
from tests.support.ledger import NO_ANSWER, Call
from tests.support.patient import PatientCallers


class OpenLoopCallers(PatientCallers):
    """A request every `1 / rate_per_s` seconds; each attempt of each takes the node that the load balancer gives it.

    A caller gives an attempt up soon after its own deadline: of a node that was cut off nothing comes, not even an error.

    Args:
        balancer: entered already.
        port: of the front on every node.
        path: of the infer route.
        deadlines_s: see `PatientCallers`.
        rate_per_s: requests a second.
        name: see `Callers`.
        seed: see `PatientCallers`.
    """

    def __init__(
        self,
        balancer: Balancer,
        port: int,
        path: str,
        deadlines_s: Sequence[float],
        *,
        rate_per_s: float = 30.0,
        name: str = "call",
        seed: int = 0,
    ) -> None:
        super().__init__(port, path, deadlines_s, name=name, seed=seed)
        self._balancer = balancer
        self._pause_s = 1.0 / rate_per_s
        self._more_s = -0.5

    async def _ask_all(self) -> None:
        connection = Balanced(self._balancer, self._port)
        began_s, number = time.monotonic(), 0
        async with asyncio.TaskGroup() as calls:
            while not self._is_over:
                number += 1
                await asyncio.sleep(max(0.0, began_s + number * self._pause_s - time.monotonic()))
                calls.create_task(self._keep(connection, f"{self._name}-{next(self._numbers)}"))

    async def _keep(self, connection: "Balanced", id: str) -> None:
        self._add(await self._call(connection, id))


class Balanced(Connection):
    """A connection of its own for each attempt, to the node that the load balancer chooses."""

    def __init__(self, balancer: Balancer, port: int) -> None:
        super().__init__(port)
        self._balancer = balancer

    async def ask(self, path: str, id: str, timeout_s: float, more: Mapping[str, str] = MappingProxyType({})) -> Call:
        """See `Connection.ask`; without a healthy node it fails at once."""
        front, now_s = self._balancer.choose(), time.monotonic()
        if front is None:
            return Call(id, now_s, now_s, NO_ANSWER, error="no node is healthy")
        connection = Connection(self._port, front)
        try:
            return replace(await connection.ask(path, id, timeout_s, more), front=front)
        finally:
            connection.close()


def longest_window_s(calls: Sequence[Call], front: str, start_s: float, end_s: float) -> float:
    """The longest time without a right answer through one node between two moments."""
    times = sorted(call.ended_s for call in calls if call.status == 200 and call.front == front)
    edges = [start_s, *(ended_s for ended_s in times if start_s <= ended_s <= end_s), end_s]
    return max(later - earlier for earlier, later in pairwise(edges))
