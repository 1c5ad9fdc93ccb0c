"""Which ports of a running cluster somebody on another machine could reach."""

from contextlib import suppress
from pathlib import Path

from ray._common.utils import psutil

from maas_ray.cluster.node.processes import find_processes
from maas_ray.cluster.node.state import load_state


def listening_outside_loopback(state_dir: Path) -> set[tuple[str, int]]:
    """Addresses and ports on which processes of the cluster that is recorded in `state_dir` wait for connections."""
    state = load_state(state_dir)
    assert state is not None
    found, names = set(), set()
    for process in find_processes(state.cluster_id):
        with suppress(psutil.NoSuchProcess):  # one that was idle ended meanwhile
            names.add(process.name())
            for connection in process.net_connections("tcp"):
                if connection.status == "LISTEN" and not connection.laddr.ip.endswith("127.0.0.1"):
                    found.add((connection.laddr.ip, connection.laddr.port))
    assert {"raylet", "gcs_server"} <= names, "the wrong processes were looked at"
    return found
