"""Reader speed: detects whether the client of a connection reads what is written to it, by the kernel's counters.

Written data is first in the server's TLS buffer, then in that of its transport, then in the kernel's, and no event loop
knows the sum. The kernel reports acknowledged and unacknowledged bytes, and there are unacknowledged ones whenever a
buffer above it contains data. On systems without these counters (macOS) the buffer of the transport is used.
"""

import asyncio
import socket
import struct
import sys
from typing import NamedTuple

_INFO_BYTES = 136
_ACKED_AT = 120
"""Offset of `tcpi_bytes_acked` in `struct tcp_info` of Linux, whose fields never move."""


class _Look(NamedTuple):
    at: float
    acked: int
    waiting: int


class ReaderSpeed:
    """Checks one connection periodically.

    Args:
        transport: transport of the connection, with or without TLS.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._last: _Look | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether data was waiting for the reader at the last check."""
        return self._last is not None

    def is_stalled(self, now: float, allowed_s: float, min_bytes_per_s: float) -> bool:
        """Whether the reader read too little over the last `allowed_s`.

        In that time it has to read all data written before, or as many bytes as the minimum speed requires: a stream of
        a few bytes is never too slow.

        Args:
            now: current time on the loop's clock.
            allowed_s: period over which the speed is measured.
            min_bytes_per_s: minimum speed.
        """
        waiting, acked = _look(self._transport)
        last = self._last
        if not waiting:
            self._last = None
            return False
        if last is not None and now - last.at <= allowed_s:
            return False
        self._last = _Look(now, acked, waiting)
        return last is not None and acked - last.acked < min(last.waiting, allowed_s * min_bytes_per_s)


def _look(transport: asyncio.Transport) -> tuple[int, int]:
    """Returns a lower bound of the bytes that wait for the reader, and the bytes acknowledged since a fixed moment."""
    buffered = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sys.platform == "linux" and sock is not None:
        import fcntl
        import termios

        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            return buffered + queued, int(struct.unpack_from("Q", info, _ACKED_AT)[0])
        except (OSError, ValueError, struct.error):  # already closed, or not TCP
            pass
    return buffered, -buffered
