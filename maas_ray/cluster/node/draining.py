"""Drains the HTTP fronts of a local cluster: they answer all requests and close each connection afterwards."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from maas_ray.haproxy.names import ADMIN_SOCKET
from maas_ray.haproxy.succession import wake_keeper

POLL_S = 0.1
_IDLE_LOOKS = 3
"""Number of consecutive polls without a request: a request can be between two connections."""


def drain_fronts(directory: Path, timeout_s: float) -> None:
    """Makes each HAProxy below `directory` refuse new connections, and waits until none has a request.

    Args:
        directory: parent of Serve's directories, one for each node on this machine.
        timeout_s: timeout of the drain.
    """
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        # Opened before the drain: a stopping HAProxy accepts no new command connections.
        consoles = [
            console for path in directory.glob(f"*/{ADMIN_SOCKET}") if (console := _open(stack, path)) is not None
        ]
        for path in directory.glob(f"*/{ADMIN_SOCKET}"):
            wake_keeper(path.parent, b"drain")
        num_idle = 0
        while consoles and num_idle < _IDLE_LOOKS and time.monotonic() < deadline:
            time.sleep(POLL_S)
            requests = [number for console in consoles if (number := _num_requests(console)) is not None]
            if not requests:
                return  # all have ended
            num_idle = 0 if any(requests) else num_idle + 1


def _open(stack: ExitStack, path: Path) -> socket.socket | None:
    console = stack.enter_context(socket.socket(socket.AF_UNIX))
    console.settimeout(2)
    try:
        console.connect(str(path))
        console.sendall(b"prompt\n")
        _read(console)
    except OSError:
        return None
    return console


def _num_requests(console: socket.socket) -> int | None:
    """Number of requests in progress or queued; None once HAProxy has ended."""
    try:
        console.sendall(b"show stat -1 2 -1\n")
        return sum(_sessions(_read(console)))
    except OSError:
        return None


def _sessions(table: str) -> Iterator[int]:
    # CSV: proxy, `BACKEND`, queued requests, their maximum, requests in progress, …
    for line in table.splitlines():
        fields = line.split(",")
        if len(fields) > 4 and fields[1] == "BACKEND":
            with suppress(ValueError):
                yield int(fields[2] or 0) + int(fields[4] or 0)


def _read(console: socket.socket) -> str:
    """Reads an answer up to the next prompt."""
    answer = b""
    while not answer.endswith(b"\n> "):
        piece = console.recv(1 << 16)
        if not piece:
            raise ConnectionError("HAProxy closed its console")
        answer += piece
    return answer.decode(errors="replace")
