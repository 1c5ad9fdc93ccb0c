"""Limits of one connection, for every protocol class: their checks and their errors. Independent of sockets.

A head must be complete in time, a body and a reader have a minimum speed, and the number of connections is limited.
"""

from maas_ray.errors import Overloaded
from maas_ray.serve.spec.limits import LimitsSpec


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
