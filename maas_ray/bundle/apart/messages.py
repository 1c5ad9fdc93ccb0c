"""Short messages between a replica and an engine's process: JSON with a length prefix, without tensors."""

import socket
import struct
from typing import Any

import orjson

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16


def send(sock: socket.socket, message: object) -> None:
    """Sends a message. Raises `OSError` if the other side has closed the socket."""
    text = orjson.dumps(message)
    sock.sendall(_LENGTH.pack(len(text)) + text)


def receive(sock: socket.socket) -> Any:
    """Receives the next message; only one is in transit at a time.

    Raises:
        EOFError: the other side has closed the socket.
        TimeoutError: no message has started to arrive within the socket's timeout.
    """
    data = sock.recv(_READ_BYTES)
    if not data:
        raise EOFError
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        more = sock.recv(_READ_BYTES)
        if not more:
            raise EOFError
        data += more
    return orjson.loads(memoryview(data)[_LENGTH.size :])
