"""The record of the cluster on this machine: its addresses, its environment and the id that marks its processes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from maas_ray.addresses import http_url
from maas_ray.errors import ClusterError
from maas_ray.process.home import HOME_VARIABLE, state_directory
from maas_ray.process.private_files import write_private

VERSION = 1
_FILE = "cluster.json"


@dataclass(frozen=True)
class ClusterState:
    """One cluster on this machine.

    `environment` is everything that a program needs to connect. It contains no secret: the token stays in its file.
    """

    cluster_id: str
    """Id in the environment of each process of the cluster, and of no other process."""
    profile: str
    address: str
    """`host:port` for `ray.init`."""
    dashboard_url: str
    """Empty on a worker node: the dashboard listens on loopback of the head node."""
    http_port: int
    """HTTP port of deployed pools."""
    token_path: str
    temp_dir: str
    started_s: float
    """Seconds since 1970."""
    environment: Mapping[str, str]
    version: int = VERSION
    role: Literal["head", "worker"] = "head"
    """A worker node has joined the cluster of another machine."""
    node_id: str = ""
    """Ray's id of a worker node."""

    @property
    def http_url(self) -> str:
        """Base URL of predictions unless a spec configures another address, which `front_url` returns."""
        return http_url("127.0.0.1", self.http_port)

    def token(self) -> str:
        """The token. Raises `ClusterError` if its file does not exist."""
        try:
            return Path(self.token_path).read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"cannot read the cluster's token {self.token_path}: {error.strerror}; run `maas-ray down`, then "
                "`maas-ray up`"
            ) from error


def load_state(state_dir: str | Path | None = None) -> ClusterState | None:
    """The recorded cluster, or None.

    Raises:
        ClusterError: the record is damaged or has another version.
    """
    path = state_directory(state_dir) / _FILE
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        if fields["version"] != VERSION:
            raise ClusterError(f"{path} has version {fields['version']}; this program reads version {VERSION}")
        return ClusterState(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"cannot read the cluster's record {path}: {error}; end the cluster's processes and remove the file"
        ) from error


def save_state(directory: Path, state: ClusterState) -> None:
    """Writes the record (mode 600) atomically: a reader sees the old or the new one."""
    write_private(directory / _FILE, json.dumps(asdict(state), indent=1))


def remove_state(directory: Path) -> None:
    """Removes the record of the cluster."""
    (directory / _FILE).unlink(missing_ok=True)


@contextmanager
def locked(directory: Path, timeout_s: float) -> Iterator[None]:
    """Locks the directory: one program at a time starts or stops its cluster.

    Raises:
        ClusterError: the directory is not writable, or another program holds the lock longer than `timeout_s`.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(directory / "lock")
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise ClusterError(
            f"another program has been starting or stopping the cluster of {directory} for more than {timeout_s:g} s; "
            "try again later"
        ) from error
    except OSError as error:
        raise ClusterError(
            f"cannot write the cluster's record to {directory}: {error.strerror}; set {HOME_VARIABLE} to a directory "
            "that this user can write"
        ) from error
    try:
        yield
    finally:
        lock.release()
