"""Whether the reader of a connection takes what is written to it. Asks the kernel: over TLS, buffers hide each other.

What a server writes lies in the buffer of its TLS, then in that of its transport, then in the kernel's, and no event loop
shows the sum. The kernel says what has been acknowledged, and what has not been yet, which is some whenever a buffer above
it holds anything. Where it does not say (macOS), the buffer of the transport has to do.
"""

import asyncio
import socket
import struct
import sys
from typing import NamedTuple

_INFO_BYTES = 136
_ACKED_AT = 120
"""Of `tcpi_bytes_acked` in `struct tcp_info` of Linux, whose fields never move."""


class _Look(NamedTuple):
    at: float
    acked: int
    waiting: int


class ReaderSpeed:
    """Looks at one connection from time to time.

    Args:
        transport: of the connection, with or without TLS.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._last: _Look | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether something waited for the reader at the last look."""
        return self._last is not None

    def is_stalled(self, now: float, allowed_s: float, min_bytes_per_s: float) -> bool:
        """Whether the reader took too little over the last `allowed_s`.

        In that time it has to take what was written before, or as many bytes as the speed asks for: a stream of a few bytes
        is never too slow.

        Args:
            now: time of the loop's clock.
            allowed_s: over which the speed is taken.
            min_bytes_per_s: that speed.
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
    """Bytes that wait for the reader, at least, and bytes that it has acknowledged since some moment."""
    buffered = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sys.platform == "linux" and sock is not None:
        import fcntl
        import termios

        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            return buffered + queued, int(struct.unpack_from("Q", info, _ACKED_AT)[0])
        except (OSError, ValueError, struct.error):  # closed meanwhile, or no TCP
            pass
    return buffered, -buffered
