"""The processes that serve, found by what they are, and the state of the replicas in HAProxy. Sends no signals."""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import ray
from ray.util.state import list_actors

from maas_ray.cluster.node.processes import find_processes, psutil
from maas_ray.cluster.node.state import load_state
from maas_ray.haproxy.config.twins import first_of
from tests.conftest import CLUSTER_ENVIRONMENT, RayCluster

Kind = Literal["replica", "haproxy", "manager", "proxy", "controller"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ACTORS = {"manager": "HAProxyManager", "proxy": "ProxyActor", "controller": "ServeController"}
"""Class names of Ray Serve's actors."""


def find(cluster: RayCluster, kind: Kind, pools: Sequence[str]) -> list[int]:
    """Process ids of all living ones of a kind.

    Args:
        cluster: whose.
        kind: which.
        pools: names of those whose replicas count.
    """
    if kind == "haproxy":
        return _haproxy(cluster)
    wanted = tuple(f"ServeReplica:{pool}:" for pool in pools) if kind == "replica" else (_ACTORS[kind],)
    filters = [("state", "=", "ALIVE")]
    actors = list_actors(cluster.dashboard_url, filters=filters, limit=1000, timeout=30)
    return sorted(int(actor.pid) for actor in actors if actor.class_name.startswith(wanted) and actor.pid)


def _haproxy(cluster: RayCluster) -> list[int]:
    """Those that listen where callers ask: one that was replaced and only answers its last requests does not count."""
    state = load_state(cluster.state_dir)
    assert state is not None
    found = []
    for process in find_processes(state.cluster_id):
        try:
            is_one = process.name() == "haproxy"
            if is_one and any(one.laddr.port == cluster.http_port and one.status == psutil.CONN_LISTEN for one in process.net_connections("inet")):  # fmt: skip
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def started(pid: int) -> str:
    """When a process started, in the kernel's words; empty once it is gone, or a zombie."""
    fields = _stat(pid)
    return "" if fields[0] in ("", "Z") else fields[19]


def is_stopped(pid: int) -> bool:
    """Whether it does not run because of SIGSTOP."""
    return _stat(pid)[0] == "T"


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [""]


def servers_up(pool: str) -> int:
    """Replicas of a pool to which HAProxy sends requests.

    Raises:
        OSError: HAProxy does not answer on its socket.
    """
    usual = Path(CLUSTER_ENVIRONMENT["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    path = usual.parent / ray.get_runtime_context().get_node_id() / usual.name  # of the head's, which callers ask
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(b"show stat\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    header, *rows = [line.split(",") for line in text.splitlines() if line]
    backend, server, status = header.index("# pxname"), header.index("svname"), header.index("status")
    # Twins have the same servers.
    rows = [row for row in rows if row[backend] == first_of(row[backend])]
    own = [row for row in rows if row[server].startswith(f"SERVE_REPLICA_{pool}-")]
    return sum(row[status].startswith("UP") for row in own)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
    """Polls until the condition holds.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.1)
