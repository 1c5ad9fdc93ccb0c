"""Messages between a process and its children: plain values as JSON, then buffers, each with a length prefix."""

import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
MAX_BLOBS = 100_000

Buffer = bytes | bytearray | memoryview


class BadFrame(Exception):
    """The received data is not a message, or is larger than the receiver accepts."""


def send_frame(sock: socket.socket, payload: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> None:
    """Sends one message, within the socket's timeout for each piece of it."""
    text = json.dumps(payload).encode()
    views = [memoryview(blob).cast("B") for blob in blobs]
    lengths = b"".join(_LENGTH.pack(view.nbytes) for view in views)
    sock.sendall(_HEAD.pack(len(text), len(views)) + lengths + text)
    for view in views:
        sock.sendall(view)


def receive_frame(
    sock: socket.socket, max_bytes: int | None = None, deadline_s: float | None = None
) -> tuple[dict[str, Any], list[bytearray]]:
    """Receives one message.

    Args:
        sock: a stream socket.
        max_bytes: maximum bytes of the message; None: no limit.
        deadline_s: monotonic time at which to stop waiting.

    Raises:
        EOFError: the other side has closed the socket.
        TimeoutError: the deadline has passed.
        BadFrame: the data is not a message, or the message is too large.
    """
    length, num_blobs = _HEAD.unpack(_exactly(sock, _HEAD.size, deadline_s))
    if num_blobs > MAX_BLOBS:
        raise BadFrame(f"a message of {num_blobs} buffers")
    sizes = [size for (size,) in _LENGTH.iter_unpack(_exactly(sock, num_blobs * _LENGTH.size, deadline_s))]
    total = length + sum(sizes)
    if max_bytes is not None and total > max_bytes:
        raise BadFrame(f"a message of {total} bytes; the limit is {max_bytes}")
    try:
        payload = json.loads(_exactly(sock, length, deadline_s))
    except (ValueError, RecursionError) as error:
        raise BadFrame("a message that is not JSON") from error
    if not isinstance(payload, dict):
        raise BadFrame("a message that is not a dictionary")
    return payload, [_exactly(sock, size, deadline_s) for size in sizes]


def _exactly(sock: socket.socket, num_bytes: int, deadline_s: float | None) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            sock.settimeout(left_s)
        received = sock.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return data
