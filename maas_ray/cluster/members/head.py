"""Starts and stops a Ray head on this machine, which other programs, `ray job submit` and the dashboard join.

Everything listens on loopback and asks for a token. With an address of the network the head takes in other machines too
(`join`). What was started is recorded, and exactly that is ended.
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
"""HAProxy allows 97 bytes for a socket's path, and Serve puts `/h/<node id of 56>/metrics.sock` below it; Ray's own
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
    """Starts a Ray head on this machine and records it. Interrupted by a signal, it first ends what it has started.

    Args:
        num_cpus: logical CPUs to offer; None offers what the machine has.
        num_gpus: logical GPUs; None offers what Ray detects.
        profile: see `environment`; None takes `fast` where HAProxy exists.
        state_dir: where the record and the token are kept; see `state_directory`.
        ports: None chooses free ones.
        temp_dir: where Ray keeps sockets and logs until `down`; None makes a short one.
        env: further variables for all processes of the cluster; they win over the profile's.
        host: the address of this machine at which other machines join; loopback keeps the cluster on this one.
        timeout_s: longest time until the dashboard answers.

    Raises:
        ClusterError: one is already running from this directory, this machine lacks what Ray needs (see `startup`), or
            Ray did not start (with what it said last).
        SpecError: `host` is no address of this machine.
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
            save_state(directory, state)  # first, so that `down` finds what an interrupted start left behind
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
    """Ends the recorded cluster: Serve answers what it accepted, then every process of the cluster ends.

    A signal does not stop it: the first one ends the wait for what Serve accepted, the second one the wait for processes
    that were asked to end, which are killed then. It acts as it would have when no process is left.

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
                raise ClusterError(f"Ray started, but within {timeout_s:g} s {error}") from error
            time.sleep(0.1)
    if not is_loopback(host):
        publish_terms(state, Terms(profile, ports.http), max(5.0, deadline - time.monotonic()))


def _drain(state: ClusterState, timeout_s: float) -> None:
    if state.role == "worker":
        from maas_ray.cluster.members.leave import leave  # needs Ray in this process

        leave(state, timeout_s)
    else:
        _drain_serve(state, timeout_s)


def _drain_serve(state: ClusterState, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    # First the front: Serve itself kills it, in the middle of whatever it has.
    drain_fronts(Path(state.temp_dir, "h"), timeout_s)
    # A dead dashboard cannot drain anything: `down` still has to end the rest.
    with contextlib.suppress(ClusterError):
        dashboard = Dashboard(state.dashboard_url, state.token())
        if dashboard.applications(timeout_s=5):
            dashboard.shutdown_serve(max(1.0, deadline - time.monotonic()))


def end(directory: Path, state: ClusterState, grace_s: float, signals: Held | None = None) -> None:
    """Ends every process of a node, and removes what is recorded of it.

    Args:
        directory: of the record.
        state: the node's.
        grace_s: time between asking a process to end and killing it; a second one of `signals` shortens it.
        signals: those that came meanwhile.

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
        raise ClusterError(f"these processes of the cluster did not end after SIGKILL: {stuck}; look at them with ps")
    shutil.rmtree(state.temp_dir, ignore_errors=True)
    for name in (TOKEN_FILE, ENVIRONMENT_FILE):
        (directory / name).unlink(missing_ok=True)
    remove_state(directory)


def forget_dead(directory: Path) -> None:
    """Clears the record of a cluster that died; refuses one that lives."""
    state = load_state(directory)
    if state is None:
        return
    from maas_ray.cluster.node.processes import find_processes

    if find_processes(state.cluster_id):
        raise ClusterError(
            f"a cluster of {directory} is already running (dashboard {state.dashboard_url}); use it, end it with "
            "`maas-ray down`, or choose another state directory for a second one"
        )
    end(directory, state, grace_s=0)


def make_temp_dir(temp_dir: Path | None) -> Path:
    """The directory of a node, made. Raises `ClusterError` if its name is too long for what lies below it."""
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


def check_amounts(**amounts: int | None) -> None:
    """Raises `ClusterError` for less than nothing."""
    for name, amount in amounts.items():
        if amount is not None and amount < 0:
            raise ClusterError(f"{name} is {amount}; give 0 or more, or leave it out to offer what the machine has")


def check_own_address(host: str) -> None:
    """Raises `SpecError` unless `host` is one address of this machine."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        if ip_address(host).is_unspecified:
            raise SpecError(f"{host} stands for every address; give the one at which other machines reach this one")
        with socket.socket(family) as sock:
            sock.bind((host, 0))
    except (ValueError, OSError) as error:
        raise SpecError(f"{host!r} is not an address of this machine ({error}); see `ip addr`") from error


def write_exports(directory: Path, state: ClusterState) -> None:
    """Writes a shell script that lets `ray`, `serve` and other programs of a terminal find this cluster."""
    write_private(directory / ENVIRONMENT_FILE, _exports(state))


def _exports(state: ClusterState) -> str:
    variables = dict(state.environment) | {"RAY_ADDRESS": state.address}
    if state.dashboard_url:
        variables |= dict.fromkeys(("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"), state.dashboard_url)
    exports = [f"export {name}='{value}'\n" for name, value in sorted(variables.items())]
    # Added to those of the terminal: `serve` and `ray job submit` talk to the dashboard over HTTP.
    exempt = "".join(
        f'export {name}="${{{name}:+${name},}}{",".join(LOOPBACK_HOSTS)}"\n' for name in ("no_proxy", "NO_PROXY")
    )
    return "".join(exports) + exempt
