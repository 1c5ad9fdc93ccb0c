"""Starts and stops a Ray head node on this machine, for other programs, `ray job submit` and the dashboard.

Every port is on loopback and requires a token. With a network address of the head node other machines can join too
(`join`). The cluster is recorded; `down` ends exactly the recorded processes.
"""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from maas_ray.addresses import LOOPBACK_HOSTS, http_url, is_loopback
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.members.terms import Terms, publish_terms
from maas_ray.cluster.node.draining import drain_fronts
from maas_ray.cluster.node.environment import LOOPBACK, Ports, Profile, choose_ports, default_profile, environment
from maas_ray.cluster.node.ray_start import start_node
from maas_ray.cluster.node.requirements import check_start, look, object_store_bytes, refuse_start
from maas_ray.cluster.node.state import (
    ClusterState,
    load_state,
    locked,
    remove_state,
    save_state,
)
from maas_ray.errors import ClusterError, SpecError
from maas_ray.process.home import state_directory
from maas_ray.process.interrupts import Held, held
from maas_ray.process.open_files import raise_limit
from maas_ray.process.private_files import write_private

TOKEN_FILE = "token"  # noqa: S105 (a name)
ENVIRONMENT_FILE = "env.sh"
MAX_TEMP_PATH_BYTES = 25
"""HAProxy allows 97 bytes for a socket's path, and Serve appends `/h/<node id of 56>/metrics.sock`; Ray's own
sockets (`/session_<date>_<pid>/sockets/plasma_store`, up to 107 bytes) need less."""


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
    check_amounts(num_cpus=num_cpus, num_gpus=num_gpus)
    check_own_address(host)
    directory = state_directory(state_dir)
    raise_limit()  # Ray's processes inherit it
    with locked(directory, timeout_s):
        forget_dead(directory)
        ports = ports or choose_ports()
        profile = profile or default_profile()
        token_path = directory / TOKEN_FILE
        temp_dir = make_temp_dir(temp_dir)
        try:
            machine = look(temp_dir, num_cpus)
            refuse_start(check_start(machine, temp_dir))
            state = ClusterState(
                cluster_id=secrets.token_hex(16),
                profile=profile,
                address=f"[{host}]:{ports.gcs}" if ":" in host else f"{host}:{ports.gcs}",
                dashboard_url=http_url(LOOPBACK, ports.dashboard),
                http_port=ports.http,
                token_path=str(token_path),
                temp_dir=str(temp_dir),
                started_s=time.time(),
                environment=environment(profile, ports=ports, temp_dir=temp_dir, token_path=token_path, host=host)
                | dict(env or {}),
            )
            write_private(token_path, secrets.token_hex(32))
            write_exports(directory, state)
            save_state(directory, state)  # before the start, so that `down` can end an interrupted one
        except BaseException:
            shutil.rmtree(temp_dir, ignore_errors=True)
            raise
        amounts = {"num-cpus": num_cpus, "num-gpus": num_gpus, "object-store-memory": object_store_bytes(machine)}
        with held() as signals:
            try:
                with signals.open():
                    _start_head(state, profile, ports, host, amounts, timeout_s)
            except BaseException:
                end(directory, state, grace_s=0)
                raise
        return state


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


def _start_head(
    state: ClusterState, profile: Profile, ports: Ports, host: str, amounts: Mapping[str, int | None], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    arguments = ["--head", f"--port={ports.gcs}", f"--node-ip-address={host}", "--include-dashboard=true"]
    arguments += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports.dashboard}"]
    arguments += [f"--ray-client-server-port={ports.client}"]
    start_node(state, arguments, amounts, timeout_s)
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


def end(directory: Path, state: ClusterState, grace_s: float, signals: Held | None = None) -> None:
    """Ends every process of a node and removes its record.

    Args:
        directory: directory of the record.
        state: record of the node.
        grace_s: time between SIGTERM and SIGKILL for a process; the second one of `signals` ends it.
        signals: signals that this process has received meanwhile.

    Raises:
        ClusterError: a process does not end.
    """
    from maas_ray.cluster.node.processes import end_processes

    stuck = end_processes(
        state.cluster_id,
        grace_s=grace_s,
        last=lambda name: name == "gcs_server",
        is_hurried=lambda: signals is not None and signals.count > 1,
    )
    if stuck:
        raise ClusterError(f"processes {stuck} of the cluster did not end after SIGKILL; inspect them with ps")
    shutil.rmtree(state.temp_dir, ignore_errors=True)
    for name in (TOKEN_FILE, ENVIRONMENT_FILE):
        (directory / name).unlink(missing_ok=True)
    remove_state(directory)


def forget_dead(directory: Path) -> None:
    """Removes the record of a dead cluster. Raises `ClusterError` if its processes are alive."""
    state = load_state(directory)
    if state is None:
        return
    from maas_ray.cluster.node.processes import find_processes

    if find_processes(state.cluster_id):
        raise ClusterError(
            f"the cluster of {directory} is already running (dashboard {state.dashboard_url}); use it, end it with "
            "`maas-ray down`, or start a second one with another --state-dir"
        )
    end(directory, state, grace_s=0)


def make_temp_dir(temp_dir: Path | None) -> Path:
    """Creates the directory of a node. Raises `ClusterError` if its name is too long for the sockets in it."""
    if temp_dir is None:
        default = Path(tempfile.gettempdir())
        # The temporary directory of macOS or of a test can be too long for the sockets in it.
        parent = default if len(os.fsencode(default)) <= MAX_TEMP_PATH_BYTES - 18 else Path("/tmp")  # noqa: S108
        temp_dir = Path(tempfile.mkdtemp(prefix="maas-ray-", dir=parent))
    if len(os.fsencode(temp_dir)) > MAX_TEMP_PATH_BYTES:
        raise ClusterError(
            f"the path of the temporary directory {temp_dir} has more than {MAX_TEMP_PATH_BYTES} bytes, too many for "
            "Unix sockets; choose a shorter one"
        )
    (temp_dir / "h").mkdir(mode=0o700, parents=True, exist_ok=True)
    return temp_dir


def check_amounts(**amounts: int | None) -> None:
    """Raises `ClusterError` for a negative amount."""
    for name, amount in amounts.items():
        if amount is not None and amount < 0:
            raise ClusterError(f"{name} is {amount}; give 0 or more, or omit it to offer all of the machine's")


def check_own_address(host: str) -> None:
    """Raises `SpecError` unless `host` is an address of this machine."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        if ip_address(host).is_unspecified:
            raise SpecError(f"{host} stands for every address; give the one that other machines can reach")
        with socket.socket(family) as sock:
            sock.bind((host, 0))
    except (ValueError, OSError) as error:
        raise SpecError(f"{host!r} is not an address of this machine ({error}); see `ip addr`") from error


def write_exports(directory: Path, state: ClusterState) -> None:
    """Writes the shell script that sets the variables of this cluster for `ray`, `serve` and other programs."""
    write_private(directory / ENVIRONMENT_FILE, _exports(state))


def _exports(state: ClusterState) -> str:
    variables = dict(state.environment) | {"RAY_ADDRESS": state.address}
    if state.dashboard_url:
        variables |= dict.fromkeys(("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"), state.dashboard_url)
    exports = [f"export {name}='{value}'\n" for name, value in sorted(variables.items())]
    # Appended to the terminal's values: `serve` and `ray job submit` contact the dashboard over HTTP.
    exempt = "".join(
        f'export {name}="${{{name}:+${name},}}{",".join(LOOPBACK_HOSTS)}"\n' for name in ("no_proxy", "NO_PROXY")
    )
    return "".join(exports) + exempt
