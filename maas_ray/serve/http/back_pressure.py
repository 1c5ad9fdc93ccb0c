"""Back-pressure of one connection, in both directions."""

import asyncio

from maas_ray.serve.spec.limits import LimitsSpec


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


class ReadingSide:
    """Whether the connection receives data: reading pauses while earlier data is processed."""

    __slots__ = ("has_ended", "is_paused")

    def __init__(self) -> None:
        self.is_paused = False
        self.has_ended = False
        """Whether the client has closed its sending side."""

    def pause(self, transport: asyncio.Transport) -> None:
        """Pauses reading, unless it is paused or there is nothing to read."""
        if not self.is_paused and not self.has_ended and not transport.is_closing():
            self.is_paused = True
            transport.pause_reading()

    def resume(self, transport: asyncio.Transport) -> None:
        """Resumes reading, if it is paused."""
        if self.is_paused and not self.has_ended and not transport.is_closing():
            self.is_paused = False
            transport.resume_reading()
