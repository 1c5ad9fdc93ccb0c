"""Frees the requests that a silent replica holds, so that HAProxy repeats them in another one.

HAProxy's own `on-marked-down shutdown-sessions` does not ask why a server went down. After a kill, where each request is
repeated at once, it also ended requests that were just on their way to their second try. Here only a server whose checks
were not answered in time counts as silent; one whose host refuses connections has lost its requests already.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.admin import ask
from maas_ray.haproxy.names import REPLAYABLE
from maas_ray.haproxy.twins import first_of

_TIMED_OUT = ("L4TOUT", "L6TOUT", "L7TOUT")
"""HAProxy's words for a check that was not answered in time: by the kernel, by TLS, by the server."""
_SERVERS = "show stat -1 4 -1"
_COLUMNS = ("pxname", "svname", "scur", "status", "check_status")


class Server(NamedTuple):
    """A line of HAProxy's statistics."""

    backend: str
    name: str
    num_requests: int
    is_down: bool
    last_check: str


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


def silent(statistics: str) -> list[Server]:
    """The servers that hold requests although they are silent.

    Args:
        statistics: what HAProxy says to `show stat`.
    """
    servers = list(_read(statistics))
    # The twin of a back end has no checks of its own; it tracks those of the first.
    found = {(server.backend, server.name) for server in servers if server.is_down and server.last_check in _TIMED_OUT}
    return [
        server
        for server in servers
        if server.num_requests and f"-{REPLAYABLE}-" in server.name and (first_of(server.backend), server.name) in found
    ]


def _read(statistics: str) -> Iterator[Server]:
    for row in csv.DictReader(statistics.removeprefix("# ").splitlines()):
        backend, name, current, status, check = (row.get(column) or "" for column in _COLUMNS)
        if name and current.isdigit():  # a check that is under way has an asterisk before the result of the last one
            yield Server(backend, name, int(current), status.startswith("DOWN"), check.removeprefix("* "))
