"""A cluster of several nodes on this machine: a head, and raylets that join it, each with its own id, CPUs and labels.

They share an address, so only the head has a front; how fronts of several machines behave is shown elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ray

from maas_ray import cluster
from maas_ray.cluster.environment import FRONT_LABEL, NO_FRONT
from maas_ray.cluster.processes import MARKER, end_processes
from maas_ray.cluster.state import ClusterState


class Nodes:
    """The cluster; this process is connected to it while the block runs.

    Args:
        head_cpus: CPUs of the head.
    """

    def __init__(self, head_cpus: int = 0) -> None:
        # Short: Unix sockets lie below it.
        self._directory = Path(tempfile.mkdtemp(prefix="n", dir=tempfile.gettempdir()))
        self._head_cpus = head_cpus
        self._started: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
        self.state: ClusterState

    def __enter__(self) -> Self:
        ports = cluster.choose_ports(http=0, dashboard=0)
        self.state = cluster.up(
            num_cpus=self._head_cpus,
            profile="fast",
            state_dir=self._directory / "s",
            temp_dir=self._directory / "t",
            ports=ports,
        )
        os.environ.update(self.state.environment)
        cluster.connect(state_dir=self._directory / "s")
        return self

    def __exit__(self, *_: object) -> None:
        cluster.disconnect()
        cluster.down(state_dir=self._directory / "s", drain_timeout_s=0)
        for node in list(self._started):
            self.kill(node)
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def state_dir(self) -> Path:
        return self._directory / "s"

    @property
    def http_port(self) -> int:
        return self.state.http_port

    @property
    def head(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def add(self, num_cpus: float, labels: Mapping[str, str] | None = None) -> str:
        """Starts a node and returns its id."""
        before = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        labels = {FRONT_LABEL: NO_FRONT, **(labels or {})}
        command = [sys.executable, "-P", str(Path(__file__).with_name("raylet.py"))]
        command += [self.state.address, str(num_cpus), json.dumps(labels)]
        mark = f"{self.state.cluster_id}-{len(before)}-{time.monotonic_ns()}"
        log = self._directory / f"node-{len(before)}.log"
        process = subprocess.Popen(
            command,
            env={**os.environ, **self.state.environment, MARKER: mark},
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 40
        while True:
            joined = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - before
            if joined:
                break
            has_failed = process.poll() is not None or time.monotonic() > deadline
            assert not has_failed, f"the node did not join: {log.read_text()[-2000:]}"
            time.sleep(0.2)
        node = str(joined.pop())
        self._started[node] = (process, mark)
        return node

    def kill(self, node: str) -> None:
        """Ends a node as a machine that loses power does: everything on it at once."""
        process, mark = self._started.pop(node)
        end_processes(mark, grace_s=0)
        process.wait(30)


def replicas(pool: str) -> list[dict[str, Any]]:
    """Replicas of a pool as Serve lists them."""
    from ray.serve.context import _get_global_client

    applications = _get_global_client().get_serve_details()["applications"]
    deployments = applications[pool]["deployments"] if pool in applications else {}
    return [json.loads(json.dumps(one, default=str)) for each in deployments.values() for one in each["replicas"]]


def spread(pool: str) -> Counter[str]:
    """Running replicas of a pool by node."""
    return Counter(one["node_id"] for one in replicas(pool) if one["state"] == "RUNNING")
