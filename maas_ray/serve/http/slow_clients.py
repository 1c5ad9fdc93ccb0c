"""Limits of one connection, for every protocol class: their checks and their errors. Independent of sockets.

A head must be complete in time, a body and a reader have a minimum speed, and the number of connections is limited.
"""

from maas_ray.errors import Overloaded
from maas_ray.serve.spec.pools import LimitsSpec


def too_many_connections(where: str, limit: int) -> Overloaded:
    """Returns the error for a connection above the limit.

    Args:
        where: the server, such as "this replica".
        limit: its number of connections.
    """
    return Overloaded(f"{where} has reached its limit of {limit} connections; retry", 1.0)


def late_head(allowed_s: float) -> str:
    """Returns the message for a head that was not complete in time."""
    return f"the head was not complete within {allowed_s:g} s; send it faster"


class BodySpeed:
    """Speed of the body of one connection, since the last check and not since its start.

    A client that stops after a quick start is detected too.
    """

    __slots__ = ("_received", "_since")

    def __init__(self) -> None:
        self._since = 0.0
        self._received = 0

    def start(self, now: float) -> None:
        """Begins a body."""
        self._since, self._received = now, 0

    def is_due(self, now: float, limits: LimitsSpec) -> bool:
        """Whether the time over which the speed is measured has passed."""
        return now - self._since > limits.io_timeout_s

    def check(self, now: float, received: int, limits: LimitsSpec) -> str:
        """Returns the message for a body that is too slow, else an empty string; the next check measures from here.

        Args:
            now: current time on the loop's clock.
            received: bytes of the body up to now.
            limits: limits of the pool.
        """
        num_new, passed_s = received - self._received, now - self._since
        self._since, self._received = now, received
        if num_new >= limits.io_timeout_s * limits.min_bytes_per_s:
            return ""
        return (
            f"{num_new} bytes of the body arrived in the last {passed_s:.0f} s; "
            f"send at least {limits.min_bytes_per_s} bytes per second"
        )


class WriteBacklog:
    """Written bytes that the client of one connection has not read, while they exceed the transport's limit."""

    __slots__ = ("_since", "_size", "is_waiting")

    def __init__(self) -> None:
        self.is_waiting = False
        """Whether the client has to read before more is written."""
        self._since = 0.0
        self._size = 0

    def start(self, now: float, size: int) -> None:
        """The transport has reached its limit, with `size` bytes in its buffer."""
        self.is_waiting, self._since, self._size = True, now, size

    def end(self) -> None:
        """The client has read enough."""
        self.is_waiting = False

    def is_stuck(self, now: float, size: int, limits: LimitsSpec) -> bool:
        """Whether the client read too slowly; `size` is the number of bytes in the buffer now."""
        if now - self._since <= limits.io_timeout_s:
            return False
        num_read = self._size - size
        self._since, self._size = now, size
        return num_read < limits.io_timeout_s * limits.min_bytes_per_s
