"""Runs `ray start` for a node, with long timeouts for a busy machine. Independent of records and roles."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from maas_ray.addresses import exempt_from_proxies
from maas_ray.cluster.node.state import ClusterState
from maas_ray.errors import ClusterError

# The caller's own connection must not leak into the new cluster.
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")

# Ray's timeouts for parts of the start, which a busy machine exceeds.
_START_TIMEOUTS = ("RAY_raylet_start_wait_time_s", "RAY_gcs_server_port_wait_time_s", "RAY_DASHBOARD_STARTUP_TIMEOUT_S")
_SLOW_START = "timed out during startup"


def node_variables(state: ClusterState, timeout_s: float) -> dict[str, str]:
    """The environment of `ray start` and of every other program that is part of the node."""
    from maas_ray.cluster.node.processes import MARKER

    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    patience = {name: str(int(timeout_s)) for name in _START_TIMEOUTS}
    variables = inherited | patience | dict(state.environment) | {MARKER: state.cluster_id}
    exempt_from_proxies(variables, [state.address.rpartition(":")[0].strip("[]")])
    return variables


def start_node(
    state: ClusterState, arguments: Sequence[str], amounts: Mapping[str, int | None], timeout_s: float
) -> None:
    """Starts Ray's processes of one node.

    Args:
        state: record of the node.
        arguments: arguments of `ray start` in addition to those of every node.
        amounts: logical resources by the name of their option; None: the machine's.
        timeout_s: timeout of the start.

    Raises:
        ClusterError: Ray did not start, with its last output.
    """
    from maas_ray.cluster.node.processes import end_processes

    deadline = time.monotonic() + timeout_s
    # -P: -m would search the working directory first.
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *arguments]
    command += [f"--temp-dir={state.temp_dir}", "--dashboard-agent-listen-port=0"]
    # 0: the operating system chooses; Ray's fixed range would conflict with a second cluster.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--{name}={amount}" for name, amount in amounts.items() if amount is not None]
    variables = node_variables(state, timeout_s)
    while (said := _run(command, variables, Path(state.temp_dir) / "start.log", deadline)) is not None:
        # Ray's timeout for the registration of a node is 30 s and not configurable; a busy machine may need a retry.
        if _SLOW_START not in said or time.monotonic() > deadline:
            raise ClusterError(f"Ray did not start; last output: {said}")
        end_processes(state.cluster_id, grace_s=0)


def _run(command: list[str], variables: Mapping[str, str], log_path: Path, deadline: float) -> str | None:
    """Runs `ray start`; returns its last output if it failed."""
    with log_path.open("wb") as log:
        try:
            finished = subprocess.run(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, deadline - time.monotonic()),
                start_new_session=True,  # Ctrl-C in the caller's terminal must not reach the cluster
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"Ray did not start in time; last output: {_tail(log_path)}") from None
    return None if finished.returncode == 0 else _tail(log_path)


def _tail(path: Path, num_lines: int = 5) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-num_lines:]) or "none"
