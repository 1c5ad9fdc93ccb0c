"""Client of a running HAProxy's admin socket. Independent of its configuration."""

import socket
from contextlib import suppress
from pathlib import Path

MAX_ANSWER_BYTES = 16 << 20


def ask(path: Path, command: str, timeout_s: float = 2.0) -> str | None:
    """Returns the response to one command; None if there is none in time."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.sendall(f"{command}\n".encode())
            answer = b""
            while (piece := sock.recv(1 << 16)) and len(answer) < MAX_ANSWER_BYTES:
                answer += piece
            return answer.decode(errors="replace")
    except OSError:
        return None


def running_pid(path: Path, timeout_s: float = 2.0) -> int | None:
    """Returns the pid of the HAProxy that answers."""
    for line in (ask(path, "show info", timeout_s) or "").splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            with suppress(ValueError):
                return int(value)
    return None
