"""Starts and stops a Ray head node on this machine, for other programs, `ray job submit` and the dashboard.

Every port is on loopback and requires a token. With a network address of the head node other machines can join too
(`join`). The cluster is recorded; `down` ends exactly the recorded processes.
"""

import contextlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from maas_ray.addresses import http_url, is_loopback
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.members.local_node import (
    NodeOptions,
    RecordedNode,
    check_own_address,
    end,
    ended_on_failure,
    forget_dead,
    record_node,
)
from maas_ray.cluster.members.terms import Terms, publish_terms
from maas_ray.cluster.node.draining import drain_fronts
from maas_ray.cluster.node.environment import LOOPBACK, Ports, Profile, choose_ports, default_profile
from maas_ray.cluster.node.ray_start import start_node
from maas_ray.cluster.node.state import ClusterState, load_state, locked
from maas_ray.errors import ClusterError
from maas_ray.process.home import state_directory
from maas_ray.process.interrupts import held
from maas_ray.process.open_files import raise_limit


def up(
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    profile: Profile | None = None,
    state_dir: str | Path | None = None,
    ports: Ports | None = None,
    temp_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    host: str = LOOPBACK,
    timeout_s: float = 120.0,
) -> ClusterState:
    """Starts a Ray head node on this machine and records it. On a signal it first ends the processes it started.

    Args:
        num_cpus: logical CPUs to offer; None: the machine's.
        num_gpus: logical GPUs to offer; None: those that Ray detects.
        profile: see `environment`; None selects `fast` where HAProxy exists.
        state_dir: directory of the record and the token; see `state_directory`.
        ports: None chooses free ones.
        temp_dir: directory of Ray's sockets and logs until `down`; None creates one with a short name.
        env: further variables for all processes of the cluster; they override the profile's.
        host: the address of this machine for others to join; with loopback none can join.
        timeout_s: timeout until the dashboard answers.

    Raises:
        ClusterError: a cluster of this directory is already running, this machine does not meet Ray's requirements
            (see `requirements`), or Ray did not start (with its last output).
        SpecError: `host` is not an address of this machine.
    """
    options = NodeOptions(num_cpus, num_gpus, temp_dir, env)
    options.check()
    check_own_address(host)
    directory = state_directory(state_dir)
    raise_limit()  # Ray's processes inherit it
    with locked(directory, timeout_s):
        forget_dead(directory)
        ports = ports or choose_ports()
        profile = profile or default_profile()
        node = record_node(
            directory,
            token=secrets.token_hex(32),
            role="head",
            profile=profile,
            address=f"[{host}]:{ports.gcs}" if ":" in host else f"{host}:{ports.gcs}",
            dashboard_url=http_url(LOOPBACK, ports.dashboard),
            host=host,
            ports=ports,
            options=options,
        )
        with ended_on_failure(directory, node.state):
            _start_head(node, profile, ports, host, timeout_s)
        return node.state


def down(
    *,
    state_dir: str | Path | None = None,
    drain_timeout_s: float = 60.0,
    grace_s: float = 5.0,
    timeout_s: float = 120.0,
) -> bool:
    """Ends the recorded cluster: Serve answers accepted requests, then every process of the cluster ends.

    A signal does not stop it: the first one ends the wait for accepted requests, the second one the wait for
    terminated processes, which are then killed. The signal takes effect once no process remains.

    Args:
        state_dir: the directory given to `up`.
        drain_timeout_s: timeout for Serve's applications to finish; 0: no wait.
        grace_s: time between SIGTERM and SIGKILL for a process.
        timeout_s: timeout for another `up` or `down` of the same directory.

    Returns:
        False if no cluster was recorded.

    Raises:
        ClusterError: a process did not end.
    """
    directory = state_directory(state_dir)
    if load_state(directory) is None:
        return False
    with locked(directory, timeout_s):
        state = load_state(directory)
        if state is None:
            return False
        with held() as signals:
            if drain_timeout_s > 0:
                with contextlib.suppress(KeyboardInterrupt), signals.open():
                    _drain(state, drain_timeout_s)
            end(directory, state, grace_s, signals)
        return True


def _start_head(node: RecordedNode, profile: Profile, ports: Ports, host: str, timeout_s: float) -> None:
    state, deadline = node.state, time.monotonic() + timeout_s
    arguments = ["--head", f"--port={ports.gcs}", f"--node-ip-address={host}", "--include-dashboard=true"]
    arguments += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports.dashboard}"]
    arguments += [f"--ray-client-server-port={ports.client}"]
    start_node(state, arguments, node.amounts, timeout_s)
    dashboard = Dashboard(state.dashboard_url, state.token())
    while True:
        try:
            dashboard.version(timeout_s=5)
            break
        except ClusterError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray started, but not its dashboard within {timeout_s:g} s: {error}") from error
            time.sleep(0.1)
    if not is_loopback(host):
        publish_terms(state, Terms(profile, ports.http), max(5.0, deadline - time.monotonic()))


def _drain(state: ClusterState, timeout_s: float) -> None:
    if state.role == "worker":
        from maas_ray.cluster.members.leave import leave  # imports Ray

        leave(state, timeout_s)
    else:
        _drain_serve(state, timeout_s)


def _drain_serve(state: ClusterState, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    # The front first: Serve kills it without waiting for its requests.
    drain_fronts(Path(state.temp_dir, "h"), timeout_s)
    # Without a dashboard nothing can be drained: `down` then only ends the processes.
    with contextlib.suppress(ClusterError):
        dashboard = Dashboard(state.dashboard_url, state.token())
        if dashboard.applications(timeout_s=5):
            dashboard.shutdown_serve(max(1.0, deadline - time.monotonic()))
