"""The HAProxy of each host as this machine sees it: its process, and the replicas to which it sends requests."""

from contextlib import suppress
from pathlib import Path

from maas_ray.haproxy.admin import ask
from maas_ray.haproxy.config.twins import first_of
from maas_ray.haproxy.generations import recorded
from maas_ray.haproxy.names import ADMIN_SOCKET, LAST_GOOD_FILE
from maas_ray.haproxy.silent import BackendServer, read
from tests.support.hosts.host import Host

_FILES = Path("tmp/haproxy-serve")
"""Serve's own place for the configuration, which cluster.yaml leaves as it is."""
_REPLICA = "ray::ServeReplica:"


def haproxy(host: Host) -> int | None:
    """The process that takes the requests, as this machine names it; None while there is none."""
    for directory in _directories(host):
        said = ask(directory / ADMIN_SOCKET, "show info") or ""
        for line in said.splitlines():
            if line.startswith("Pid: "):
                return _outside(host, int(line.removeprefix("Pid: ")))
    return None


def servers(host: Host, pool: str) -> list[BackendServer]:
    """The replicas of a pool that the host's HAProxy knows, of HTTP; empty while it does not answer."""
    for directory in _directories(host):
        if said := ask(directory / ADMIN_SOCKET, "show stat -1 4 -1"):
            found = [server for server in read(said) if first_of(server.backend) == server.backend == f"http-{pool}"]
            return [server for server in found if server.name.startswith(f"SERVE_REPLICA_{pool}-")]
    return []


def replicas(host: Host, pool: str) -> list[int]:
    """The replicas of a pool on a host, as this machine names them."""
    return host.pids(f"{_REPLICA}{pool}:") if host.is_up else []


def keepers(host: Host) -> list[int]:
    """The programs that watch the host's HAProxy."""
    return host.pids("-m maas_ray.haproxy.keeper")


def _directories(host: Host) -> list[Path]:
    """Of each node that this host was since it started, the newest first."""
    if not host.is_up:
        return []
    root = Path(f"/proc/{host.first_pid()}/root") / _FILES
    found = [path for path in root.glob("*/") if (path / ADMIN_SOCKET).exists()]
    return sorted(found, key=lambda path: max((one.started_s for one in recorded(path)), default=0.0), reverse=True)


def _outside(host: Host, pid: int) -> int | None:
    for found in [*host.pids("haproxy.cfg"), *host.pids(LAST_GOOD_FILE)]:
        with suppress(OSError):
            lines = Path(f"/proc/{found}/status").read_text().splitlines()
            if next(line for line in lines if line.startswith("NSpid:")).split()[-1] == str(pid):
                return found
    return None
