"""Frees the requests that a silent replica holds, so that HAProxy repeats them in another one.

HAProxy's own `on-marked-down shutdown-sessions` ignores why a server went down. After a kill, where each request is
repeated immediately, it also ended requests that were about to be repeated. Here a server counts as silent only if its
checks were not answered in time, or its host is unreachable; a server whose host refuses connections has already lost
its requests.
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
"""HAProxy's results of a check without a response in time: of the kernel, of TLS, of the server."""
_NO_CONNECTION = "L4CON"
"""Any other failure of a check's connection: `last_chk` has the kernel's reason."""
_NOT_REACHED = tuple(map(os.strerror, (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT)))
"""Errors of a router or the kernel for a host that was cut off. Its open connections end only after many minutes of
TCP's own retransmissions: requests on them waited until the host was back (13 s for 10 s)."""
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
    """Details of the last check; empty while the next one is in progress."""

    @property
    def is_silent(self) -> bool:
        """Whether it is down although it may still hold its requests."""
        is_unreached = self.last_check == _NO_CONNECTION and any(words in self.reason for words in _NOT_REACHED)
        return self.is_down and (self.last_check in _TIMED_OUT or is_unreached)


def free_requests(admin_socket: Path, timeout_s: float) -> dict[str, int]:
    """Closes the connections to silent replicas whose requests may be repeated; HAProxy then repeats them.

    Args:
        admin_socket: admin socket of a running HAProxy.
        timeout_s: time limit of each of its responses.

    Returns:
        Number of freed requests, by `backend/server`.
    """
    freed = {}
    for server in silent(ask(admin_socket, _SERVERS, timeout_s) or ""):
        path = f"{server.backend}/{server.name}"
        if ask(admin_socket, f"shutdown sessions server {path}", timeout_s) is not None:
            freed[path] = server.num_requests
    return freed


def silent(statistics: str) -> list[BackendServer]:
    """Returns the silent servers that hold requests.

    Args:
        statistics: HAProxy's response to `show stat`.
    """
    # All columns of 500 servers take 12 ms of CPU, twice a second; usually there is nothing to find.
    if not any(",DOWN" in row and ("TOUT" in row or _NO_CONNECTION in row) for row in statistics.splitlines()):
        return []
    servers = list(read(statistics))
    # The twin of a back end has no checks of its own; it tracks the servers of the first back end.
    found = {(server.backend, server.name) for server in servers if server.is_silent}
    return [
        server
        for server in servers
        if server.num_requests and f"-{REPLAYABLE}-" in server.name and (first_of(server.backend), server.name) in found
    ]


def read(statistics: str) -> Iterator[BackendServer]:
    """Yields the servers in HAProxy's response to `show stat`."""
    for row in csv.DictReader(statistics.removeprefix("# ").splitlines()):
        backend, name, current, status, check, reason = (row.get(column) or "" for column in _COLUMNS)
        if name and current.isdigit():  # a check in progress has an asterisk before the last result
            yield BackendServer(
                backend, name, int(current), status.startswith("DOWN"), check.removeprefix("* "), reason
            )
