"""Frees the requests that a silent replica holds, so that HAProxy repeats them in another one.

HAProxy's own `on-marked-down shutdown-sessions` does not ask why a server went down. After a kill, where each request is
repeated at once, it also ended requests that were just on their way to their second try. Here only a server whose checks
were not answered in time, or whose host is not reached, counts as silent; one whose host refuses connections has lost its
requests already.
"""

import csv
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.admin import ask
from maas_ray.haproxy.config.twins import first_of
from maas_ray.haproxy.names import REPLAYABLE

_TIMED_OUT = ("L4TOUT", "L6TOUT", "L7TOUT")
"""HAProxy's words for a check that was not answered in time: by the kernel, by TLS, by the server."""
_NO_CONNECTION = "L4CON"
"""Any other failure of a check's connection: `last_chk` has the kernel's reason."""
_NOT_REACHED = tuple(map(os.strerror, (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT)))
"""What a router or the kernel says in place of a host that was cut off. Its open connections end only after many minutes
of TCP's own repetitions: requests in them waited until the host was back (13 s for 10 s)."""
_SERVERS = "show stat -1 4 -1"
_COLUMNS = ("pxname", "svname", "scur", "status", "check_status", "last_chk")


class BackendServer(NamedTuple):
    """A line of HAProxy's statistics."""

    backend: str
    name: str
    num_requests: int
    is_down: bool
    last_check: str
    reason: str
    """More about the last check; empty while the next one is under way."""

    @property
    def is_silent(self) -> bool:
        """Whether it is out of the rotation although nothing says that it has lost its requests."""
        is_unreached = self.last_check == _NO_CONNECTION and any(words in self.reason for words in _NOT_REACHED)
        return self.is_down and (self.last_check in _TIMED_OUT or is_unreached)


def free_requests(admin_socket: Path, timeout_s: float) -> dict[str, int]:
    """Ends the connections to silent replicas whose requests may be repeated; HAProxy then repeats them.

    Args:
        admin_socket: of a running HAProxy.
        timeout_s: for each of its answers.

    Returns:
        Requests freed, by `backend/server`.
    """
    freed = {}
    for server in silent(ask(admin_socket, _SERVERS, timeout_s) or ""):
        path = f"{server.backend}/{server.name}"
        if ask(admin_socket, f"shutdown sessions server {path}", timeout_s) is not None:
            freed[path] = server.num_requests
    return freed


def silent(statistics: str) -> list[BackendServer]:
    """The servers that hold requests although they are silent.

    Args:
        statistics: what HAProxy says to `show stat`.
    """
    # All columns of 500 servers are 12 ms of CPU, twice a second; most of the time there is nothing to be found.
    if not any(",DOWN" in row and ("TOUT" in row or _NO_CONNECTION in row) for row in statistics.splitlines()):
        return []
    servers = list(read(statistics))
    # The twin of a back end has no checks of its own; it tracks those of the first.
    found = {(server.backend, server.name) for server in servers if server.is_silent}
    return [
        server
        for server in servers
        if server.num_requests and f"-{REPLAYABLE}-" in server.name and (first_of(server.backend), server.name) in found
    ]


def read(statistics: str) -> Iterator[BackendServer]:
    """The servers in HAProxy's answer to `show stat`."""
    for row in csv.DictReader(statistics.removeprefix("# ").splitlines()):
        backend, name, current, status, check, reason = (row.get(column) or "" for column in _COLUMNS)
        if name and current.isdigit():  # a check that is under way has an asterisk before the result of the last one
            yield BackendServer(
                backend, name, int(current), status.startswith("DOWN"), check.removeprefix("* "), reason
            )
