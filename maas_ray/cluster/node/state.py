"""The record of the cluster that was started on this machine: where it listens and which processes are its own."""

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

    `environment` is everything that a program needs to join, and holds no secret: the token stays in its file.
    """

    cluster_id: str
    """In the environment of each of the cluster's processes, and of nobody else's."""
    profile: str
    address: str
    """`host:port` for `ray.init`."""
    dashboard_url: str
    """Empty for a worker: the dashboard listens on loopback of the head."""
    http_port: int
    """Where pools are served once they are deployed."""
    token_path: str
    temp_dir: str
    started_s: float
    """Seconds since 1970."""
    environment: Mapping[str, str]
    version: int = VERSION
    role: Literal["head", "worker"] = "head"
    """A worker has joined a cluster whose head is another machine."""
    node_id: str = ""
    """Ray's, of a worker."""

    @property
    def http_url(self) -> str:
        """Base URL of predictions unless a spec configures another address; `front_url` asks for that."""
        return http_url("127.0.0.1", self.http_port)

    def token(self) -> str:
        """The token. Raises `ClusterError` if its file is gone."""
        try:
            return Path(self.token_path).read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"cannot read the cluster's token {self.token_path}: {error.strerror}; run `maas-ray down`, then up"
            ) from error


def load_state(state_dir: str | Path | None = None) -> ClusterState | None:
    """The recorded cluster, or None.

    Raises:
        ClusterError: the record is damaged or of another version.
    """
    path = state_directory(state_dir) / _FILE
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        if fields["version"] != VERSION:
            raise ClusterError(f"{path} has version {fields['version']}; this program reads {VERSION}")
        return ClusterState(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"cannot read the record of the local cluster {path}: {error}; end its processes and remove the file"
        ) from error


def save_state(directory: Path, state: ClusterState) -> None:
    """Writes the record (mode 600) in one step: a reader sees the old one or the new one."""
    write_private(directory / _FILE, json.dumps(asdict(state), indent=1))


def remove_state(directory: Path) -> None:
    """Forgets the cluster."""
    (directory / _FILE).unlink(missing_ok=True)


@contextmanager
def locked(directory: Path, timeout_s: float) -> Iterator[None]:
    """Lets one program at a time start or stop the cluster of this directory.

    Raises:
        ClusterError: the directory cannot be written, or another program holds it longer than `timeout_s`.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(directory / "lock")
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise ClusterError(
            f"another program is starting or stopping the cluster of {directory} for more than {timeout_s:g} s"
        ) from error
    except OSError as error:
        raise ClusterError(
            f"cannot use {directory} for the cluster's record: {error.strerror}; set {HOME_VARIABLE} to a directory "
            "that this user can write"
        ) from error
    try:
        yield
    finally:
        lock.release()
