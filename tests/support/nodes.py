"""More nodes for the session's cluster, on this machine: each a raylet with its own id, CPUs, labels and front."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from maas_ray.cluster.node.environment import FRONT_LABEL, NO_FRONT
from maas_ray.cluster.node.processes import MARKER, end_processes
from tests.conftest import RayCluster, unused_port
from tests.support.runs import until

JOIN_S = 120.0


class Nodes:
    """Nodes that were added.

    Args:
        cluster: the cluster that they join.
        logs: directory for what they say.
    """

    def __init__(self, cluster: RayCluster, logs: Path) -> None:
        self._cluster = cluster
        self._logs = logs
        self._started: dict[str, tuple[subprocess.Popen[bytes], str]] = {}

    def add(self, num_cpus: float, labels: Mapping[str, str] | None = None, front_port: int | None = None) -> str:
        """Starts a node and returns its id.

        Args:
            num_cpus: what it offers.
            labels: of the node.
            front_port: where its front listens; None: it has none.
        """
        before = _alive()
        labels = dict(labels or {}) if front_port else {FRONT_LABEL: NO_FRONT, **(labels or {})}
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        # Ray gives a node 30 s to register, which a busy machine exceeds.
        patience = {"RAY_raylet_start_wait_time_s": str(int(JOIN_S))}
        environment = {**os.environ, **self._cluster.env, **patience, MARKER: mark}
        if front_port:
            environment["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(front_port)
            for name in ("WORKER_PROXY_GRPC_PORT", "HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT"):
                environment[f"RAY_SERVE_{name}"] = str(unused_port())
        log = self._logs / f"node-{mark}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    sys.executable, "-P", str(Path(__file__).with_name("raylet.py")),
                    self._cluster.address, str(num_cpus), json.dumps(labels),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        until(lambda: _alive() - before or process.poll() is not None, "new node", wait_s=JOIN_S)
        assert process.poll() is None, log.read_text()[-3000:]
        node = (_alive() - before).pop()
        self._started[node] = (process, mark)
        return node

    def kill(self, node: str) -> None:
        """Ends all processes of a node at once."""
        process, mark = self._started.pop(node)
        end_processes(mark, grace_s=0)
        process.wait(30)
        until(lambda: node not in _alive(), "end of the node", wait_s=JOIN_S)

    def drain(self, node: str) -> None:
        """Tells Ray that a node will go."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self._cluster.address}"]
        command += [f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        command += ["--deadline-remaining-seconds=120"]
        environment = {**os.environ, **self._cluster.env}
        subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)

    def end(self) -> None:
        """Ends all nodes that are left."""
        for node in list(self._started):
            self.kill(node)


@contextmanager
def more_nodes(cluster: RayCluster, logs: Path) -> Iterator[Nodes]:
    """Nodes for the block."""
    nodes = Nodes(cluster, logs)
    try:
        yield nodes
    finally:
        nodes.end()


def replicas(pool: str) -> list[tuple[str, str | None]]:
    """State and node of each replica of a pool, as Serve lists them."""
    from maas_ray.serve.deploy.standing import read_standings

    standing = read_standings().get(pool)
    return [] if standing is None else [(one.state, one.node) for one in standing.replicas]


def spread(pool: str) -> dict[str | None, int]:
    """Running replicas of a pool by node."""
    return dict(Counter(node for state, node in replicas(pool) if state == "RUNNING"))


def _alive() -> set[str]:
    nodes: list[dict[str, Any]] = ray.nodes()
    return {node["NodeID"] for node in nodes if node["Alive"]}
