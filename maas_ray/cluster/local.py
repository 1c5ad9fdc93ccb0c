"""Starts and stops one Ray cluster on this machine: a head that other programs, `ray job submit` and the dashboard join.

Everything listens on loopback and asks for a token. What was started is recorded, and exactly that is ended.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from maas_ray.addresses import LOOPBACK_HOSTS, exempt_from_proxies, http_url
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.draining import drain_fronts
from maas_ray.cluster.environment import LOOPBACK, Ports, Profile, choose_ports, default_profile, environment
from maas_ray.cluster.state import (
    ClusterState,
    load_state,
    locked,
    remove_state,
    save_state,
    state_directory,
    write_private,
)
from maas_ray.errors import ClusterError

TOKEN_FILE = "token"  # noqa: S105 (a name)
ENVIRONMENT_FILE = "env.sh"
MAX_TEMP_PATH_BYTES = 25
"""HAProxy allows 97 bytes for a socket's path, and Serve puts `/h/<node id of 56>/metrics.sock` below it; Ray's own
sockets (`/session_<date>_<pid>/sockets/plasma_store`, up to 107 bytes) need less."""

# The caller's own connection must not leak into the cluster that is started.
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")

# Ray's own limits for parts of the start, which a busy machine exceeds.
_START_TIMEOUTS = ("RAY_raylet_start_wait_time_s", "RAY_gcs_server_port_wait_time_s", "RAY_DASHBOARD_STARTUP_TIMEOUT_S")
_SLOW_START = "timed out during startup"


def up(
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    profile: Profile | None = None,
    state_dir: str | Path | None = None,
    ports: Ports | None = None,
    temp_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
) -> ClusterState:
    """Starts a Ray head on this machine and records it.

    Args:
        num_cpus: logical CPUs to offer; None offers what the machine has.
        num_gpus: logical GPUs; None offers what Ray detects.
        profile: see `environment`; None takes `fast` where HAProxy exists.
        state_dir: where the record and the token are kept; see `state_directory`.
        ports: None chooses free ones.
        temp_dir: where Ray keeps sockets and logs until `down`; None makes a short one.
        env: further variables for all processes of the cluster; they win over the profile's.
        timeout_s: longest time until the dashboard answers.

    Raises:
        ClusterError: one is already running from this directory, or Ray did not start (with what it said last).
    """
    for name, amount in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if amount is not None and amount < 0:
            raise ClusterError(f"{name} is {amount}; give 0 or more, or leave it out to offer what the machine has")
    directory = state_directory(state_dir)
    with locked(directory, timeout_s):
        _forget_dead(directory)
        ports = ports or choose_ports()
        profile = profile or default_profile()
        token_path = directory / TOKEN_FILE
        temp_dir = _make_temp_dir(temp_dir)
        try:
            state = ClusterState(
                cluster_id=secrets.token_hex(16),
                profile=profile,
                address=f"{LOOPBACK}:{ports.gcs}",
                dashboard_url=http_url(LOOPBACK, ports.dashboard),
                http_port=ports.http,
                token_path=str(token_path),
                temp_dir=str(temp_dir),
                started_s=time.time(),
                environment=environment(profile, ports=ports, temp_dir=temp_dir, token_path=token_path)
                | dict(env or {}),
            )
            write_private(token_path, secrets.token_hex(32))
            write_private(directory / ENVIRONMENT_FILE, _exports(state))
            save_state(directory, state)  # first, so that `down` finds what an interrupted start left behind
        except BaseException:
            shutil.rmtree(temp_dir, ignore_errors=True)
            raise
        try:
            _start_head(state, ports, num_cpus, num_gpus, timeout_s)
        except BaseException:
            _end(directory, state, grace_s=0)
            raise
        return state


def down(
    *,
    state_dir: str | Path | None = None,
    drain_timeout_s: float = 60.0,
    grace_s: float = 5.0,
    timeout_s: float = 120.0,
) -> bool:
    """Ends the recorded cluster: Serve answers what it accepted, then every process of the cluster ends.

    Args:
        state_dir: the directory given to `up`.
        drain_timeout_s: longest time for Serve's applications to finish; 0 does not wait for them.
        grace_s: time between asking a process to end and killing it.
        timeout_s: longest wait for another `up` or `down` of the same directory.

    Returns:
        False if there was nothing to end.

    Raises:
        ClusterError: a process could not be ended.
    """
    directory = state_directory(state_dir)
    if load_state(directory) is None:
        return False
    with locked(directory, timeout_s):
        state = load_state(directory)
        if state is None:
            return False
        if drain_timeout_s > 0:
            _drain_serve(state, drain_timeout_s)
        _end(directory, state, grace_s)
        return True


def _start_head(
    state: ClusterState, ports: Ports, num_cpus: int | None, num_gpus: int | None, timeout_s: float
) -> None:
    from maas_ray.cluster.processes import MARKER, end_processes

    deadline = time.monotonic() + timeout_s
    # -P: not from the working directory, which -m would put first.
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
    command += [f"--port={ports.gcs}", f"--temp-dir={state.temp_dir}", f"--node-ip-address={LOOPBACK}"]
    command += ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports.dashboard}"]
    command += [f"--ray-client-server-port={ports.client}", "--dashboard-agent-listen-port=0"]
    # 0: the system chooses; Ray's fixed range would clash with a second cluster.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-cpus={num_cpus}"] if num_cpus is not None else []
    command += [f"--num-gpus={num_gpus}"] if num_gpus is not None else []
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    patience = {name: str(int(timeout_s)) for name in _START_TIMEOUTS}
    variables = inherited | patience | dict(state.environment) | {MARKER: state.cluster_id}
    exempt_from_proxies(variables)
    while (said := _run_start(command, variables, Path(state.temp_dir) / "start.log", deadline)) is not None:
        # Ray gives a node 30 s to register, and offers no way to change that; a busy machine may need a second go.
        if _SLOW_START not in said or time.monotonic() > deadline:
            raise ClusterError(f"Ray did not start; it said last: {said}")
        end_processes(state.cluster_id, grace_s=0)
    dashboard = Dashboard(state.dashboard_url, state.token())
    while True:
        try:
            dashboard.version(timeout_s=5)
            return
        except ClusterError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray started, but within {timeout_s:g} s {error}") from error
            time.sleep(0.1)


def _run_start(command: list[str], variables: Mapping[str, str], log_path: Path, deadline: float) -> str | None:
    """Runs `ray start`; returns what it said last if it failed."""
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
            raise ClusterError(f"Ray did not start in time; it said last: {_tail(log_path)}") from None
    return None if finished.returncode == 0 else _tail(log_path)


def _drain_serve(state: ClusterState, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    # First the front: Serve itself kills it, in the middle of whatever it has.
    drain_fronts(Path(state.temp_dir, "h"), timeout_s)
    # A dead dashboard cannot drain anything: `down` still has to end the rest.
    with contextlib.suppress(ClusterError):
        dashboard = Dashboard(state.dashboard_url, state.token())
        if dashboard.applications(timeout_s=5):
            dashboard.shutdown_serve(max(1.0, deadline - time.monotonic()))


def _end(directory: Path, state: ClusterState, grace_s: float) -> None:
    from maas_ray.cluster.processes import end_processes

    stuck = end_processes(state.cluster_id, grace_s=grace_s, last=lambda name: name == "gcs_server")
    if stuck:
        raise ClusterError(f"these processes of the cluster did not end after SIGKILL: {stuck}; look at them with ps")
    shutil.rmtree(state.temp_dir, ignore_errors=True)
    for name in (TOKEN_FILE, ENVIRONMENT_FILE):
        (directory / name).unlink(missing_ok=True)
    remove_state(directory)


def _forget_dead(directory: Path) -> None:
    """Clears the record of a cluster that died; refuses one that lives."""
    state = load_state(directory)
    if state is None:
        return
    from maas_ray.cluster.processes import find_processes

    if find_processes(state.cluster_id):
        raise ClusterError(
            f"a cluster of {directory} is already running (dashboard {state.dashboard_url}); use it, end it with "
            "`maas-ray down`, or choose another state directory for a second one"
        )
    _end(directory, state, grace_s=0)


def _make_temp_dir(temp_dir: Path | None) -> Path:
    if temp_dir is None:
        default = Path(tempfile.gettempdir())
        # macOS's and a test's temporary directory can be too long for the sockets below it.
        parent = default if len(os.fsencode(default)) <= MAX_TEMP_PATH_BYTES - 18 else Path("/tmp")  # noqa: S108
        temp_dir = Path(tempfile.mkdtemp(prefix="maas-ray-", dir=parent))
    if len(os.fsencode(temp_dir)) > MAX_TEMP_PATH_BYTES:
        raise ClusterError(
            f"the temporary directory {temp_dir} has more than {MAX_TEMP_PATH_BYTES} bytes, too many for the Unix "
            "sockets below it; choose a shorter one"
        )
    (temp_dir / "h").mkdir(mode=0o700, parents=True, exist_ok=True)
    return temp_dir


def _exports(state: ClusterState) -> str:
    """A shell script that lets `ray`, `serve` and other programs of a terminal find this cluster."""
    variables = dict(state.environment) | {
        "RAY_ADDRESS": state.address,
        "RAY_API_SERVER_ADDRESS": state.dashboard_url,
        "RAY_DASHBOARD_ADDRESS": state.dashboard_url,
    }
    exports = [f"export {name}='{value}'\n" for name, value in sorted(variables.items())]
    # Added to those of the terminal: `serve` and `ray job submit` talk to the dashboard over HTTP.
    exempt = "".join(
        f'export {name}="${{{name}:+${name},}}{",".join(LOOPBACK_HOSTS)}"\n' for name in ("no_proxy", "NO_PROXY")
    )
    return "".join(exports) + exempt


def _tail(path: Path, num_lines: int = 5) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-num_lines:]) or "nothing"
