"""What the start of a head and of a worker node have in common: checks, the record of the node, and its end."""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from maas_ray.addresses import LOOPBACK_HOSTS
from maas_ray.cluster.node.environment import Ports, Profile, environment
from maas_ray.cluster.node.requirements import check_start, look, object_store_bytes, refuse_start
from maas_ray.cluster.node.state import ClusterState, load_state, remove_state, save_state
from maas_ray.errors import ClusterError, SpecError
from maas_ray.process.interrupts import Held, held
from maas_ray.process.private_files import write_private

TOKEN_FILE = "token"  # noqa: S105 (a name)
ENVIRONMENT_FILE = "env.sh"
MAX_TEMP_PATH_BYTES = 25
"""HAProxy allows 97 bytes for a socket's path, and Serve appends `/h/<node id of 56>/metrics.sock`; Ray's own
sockets (`/session_<date>_<pid>/sockets/plasma_store`, up to 107 bytes) need less."""


@dataclass(frozen=True)
class NodeOptions:
    """What the user decides about a node of this machine."""

    num_cpus: int | None
    """Logical CPUs to offer; None: the machine's."""
    num_gpus: int | None
    """Logical GPUs to offer; None: those that Ray detects."""
    temp_dir: Path | None
    """Directory of Ray's sockets and logs; None creates one with a short name."""
    env: Mapping[str, str] | None
    """Further variables for all processes of the node; they override the profile's."""

    def check(self) -> None:
        """Raises `ClusterError` for a negative amount."""
        for name, amount in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if amount is not None and amount < 0:
                raise ClusterError(f"{name} is {amount}; give 0 or more, or omit it to offer all of the machine's")


@dataclass(frozen=True)
class RecordedNode:
    """A node that is recorded and can be started."""

    state: ClusterState
    amounts: Mapping[str, int | None]
    """Logical resources by their option of `ray start`; None: the machine's."""


def record_node(
    directory: Path,
    *,
    token: str,
    role: Literal["head", "worker"],
    profile: Profile,
    address: str,
    dashboard_url: str,
    host: str,
    ports: Ports,
    options: NodeOptions,
) -> RecordedNode:
    """Records a node of this machine before its start, so that `down` can end an interrupted one.

    Args:
        directory: directory of the record.
        token: token of the cluster.
        role: role of the node.
        profile: profile of the cluster.
        address: `host:port` of the head node.
        dashboard_url: URL of the dashboard; empty on a worker node.
        host: address of this machine in the cluster.
        ports: ports of the node.
        options: amounts, directory and variables.

    Raises:
        ClusterError: this machine does not meet Ray's requirements (see `requirements`); nothing remains.
    """
    token_path = directory / TOKEN_FILE
    with contextlib.ExitStack() as undo:
        undo.callback(token_path.unlink, missing_ok=True)
        write_private(token_path, token)
        temp_dir = make_temp_dir(options.temp_dir)
        undo.callback(shutil.rmtree, temp_dir, ignore_errors=True)
        machine = look(temp_dir, options.num_cpus)
        refuse_start(check_start(machine, temp_dir))
        state = ClusterState(
            cluster_id=secrets.token_hex(16),
            profile=profile,
            address=address,
            dashboard_url=dashboard_url,
            http_port=ports.http,
            token_path=str(token_path),
            temp_dir=str(temp_dir),
            started_s=time.time(),
            environment=environment(profile, ports=ports, temp_dir=temp_dir, token_path=token_path, host=host)
            | dict(options.env or {}),
            role=role,
        )
        write_exports(directory, state)
        save_state(directory, state)
        undo.pop_all()
    amounts = {
        "num-cpus": options.num_cpus,
        "num-gpus": options.num_gpus,
        "object-store-memory": object_store_bytes(machine),
    }
    return RecordedNode(state, amounts)


@contextlib.contextmanager
def ended_on_failure(directory: Path, state: ClusterState) -> Iterator[None]:
    """Ends the node if the block raises or is interrupted by a signal."""
    with held() as signals:
        try:
            with signals.open():
                yield
        except BaseException:
            end(directory, state, grace_s=0)
            raise


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
