"""A load balancer as docs/clusters/machines.md advises one: it asks each node's front for its health, and leaves out what fails."""

import http.client
import threading
import time
from collections.abc import Sequence
from itertools import count

from maas_ray.cluster.health.front import HEALTH

EVERY_S = 1.0
TIMEOUT_S = 1.0
NUM_FAILURES = 2
"""Refusals and errors in a row after which a node is left out; one answer that does not come in time is enough."""


class Balancer:
    """A context manager; while it is entered, each front is asked for its health.

    Args:
        addresses: of the nodes.
        port: of the front on each of them.
        every_s: time between two questions to one node.
        timeout_s: longest time for an answer.
        asks: False is the planted fault: a load balancer that sends requests everywhere, whatever becomes of the nodes.
    """

    def __init__(self, addresses: Sequence[str], port: int, *, every_s: float = EVERY_S, timeout_s: float = TIMEOUT_S, asks: bool = True) -> None:  # fmt: skip
        self._healthy = dict.fromkeys(addresses, not asks)
        self._port = port
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._turns = count()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(address,)) for address in addresses if asks]

    def __enter__(self) -> "Balancer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * self._timeout_s + 5)

    @property
    def healthy(self) -> list[str]:
        """Addresses of the nodes that answer."""
        return [address for address, is_healthy in self._healthy.items() if is_healthy]

    def choose(self) -> str | None:
        """The node for the next request, one after another; None while none is healthy."""
        healthy = self.healthy
        return healthy[next(self._turns) % len(healthy)] if healthy else None

    def _watch(self, address: str) -> None:
        num_failures = 0
        while not self._is_over.is_set():
            asked_s = time.monotonic()
            try:
                num_failures = 0 if self._answers(address) else num_failures + 1
            except TimeoutError:
                num_failures = NUM_FAILURES
            if num_failures == 0 or num_failures >= NUM_FAILURES:
                self._healthy[address] = num_failures == 0
            self._is_over.wait(max(0.0, asked_s + self._every_s - time.monotonic()))

    def _answers(self, address: str) -> bool:
        """Whether a node says that it is well. Raises `TimeoutError`."""
        connection = http.client.HTTPConnection(address, self._port, timeout=self._timeout_s)
        try:
            connection.request("GET", HEALTH)
            return connection.getresponse().status == 200
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
