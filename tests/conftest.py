"""Shared fixtures: real stores (a directory; an S3 service over HTTP) and one real Ray cluster for the session."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
import requests

from maas_ray import cluster
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store

if TYPE_CHECKING:
    from tests.support.paths import FinishedRun

# Set before any Ray worker starts: credentials reach every process through its environment, as on a cluster.
os.environ.update(
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)

# Ray Serve and Ray Train read theirs at import, and test modules import them before any fixture runs.
_TEMP_DIR = Path(tempfile.gettempdir()) / f"mr-{os.getpid()}"
SESSION_STATE_DIR = _TEMP_DIR.with_name(f"{_TEMP_DIR.name}-state")
_PORTS = cluster.choose_ports(http=0, dashboard=0)
CLUSTER_ENVIRONMENT = cluster.environment(
    "fast", ports=_PORTS, temp_dir=_TEMP_DIR, token_path=SESSION_STATE_DIR / "token"
)
os.environ.update(CLUSTER_ENVIRONMENT)


_LONGEST = "test_readme.py::test_the_commands_run_in_order"


@dataclass(frozen=True)
class RayCluster:
    """The session's Ray cluster, to which the test process is connected."""

    address: str
    dashboard_url: str
    http_port: int
    """The port that a deployment must serve on: `ServeSpec.http.port`."""
    token: str
    """For the dashboard: `Authorization: Bearer <token>`."""
    env: Mapping[str, str]
    """What a subprocess needs in its environment to join: `{**os.environ, **ray_cluster.env}`."""
    state_dir: Path


@pytest.hookimpl(tryfirst=True)  # xdist reads the markers in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those of the cluster share one: a machine has room for one such cluster.

    The longest of the others comes first, so that the many short ones fill the time of both processes to the end.
    """
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("cluster"))
    items.sort(key=lambda item: not item.nodeid.endswith(_LONGEST))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray head with 8 logical CPUs and the fast profile; ended by its own record, with all that it started."""
    try:
        state = cluster.up(num_cpus=8, profile="fast", state_dir=SESSION_STATE_DIR, temp_dir=_TEMP_DIR, ports=_PORTS)
        cluster.connect(state_dir=SESSION_STATE_DIR)
        env = {**state.environment, "RAY_ADDRESS": state.address, "RAY_API_SERVER_ADDRESS": state.dashboard_url}
        yield RayCluster(state.address, state.dashboard_url, state.http_port, state.token(), env, SESSION_STATE_DIR)
    finally:
        cluster.disconnect()
        cluster.down(state_dir=SESSION_STATE_DIR, drain_timeout_s=0)
        shutil.rmtree(SESSION_STATE_DIR, ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(ray_cluster: RayCluster, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> "FinishedRun":
    """A table in an S3 store, for tests that continue a whole run or compare with it: starting one takes long."""
    from maas_ray.train.loop.progress import Progress
    from maas_ray.train.run import run_training
    from tests.support.paths import FinishedRun, table_spec
    from tests.support.table import write_table

    storage = StorageSpec(uri="s3://maas/finished", endpoint=s3_endpoint)
    table = write_table(tmp_path_factory.mktemp("table"))
    notes = tmp_path_factory.mktemp("notes") / "events"
    followed = {"path": "tests.support.following:Notes", "params": {"file": str(notes)}}
    spec = table_spec(storage, "table", table, callbacks=[followed])
    reports: list[Progress] = []
    result = run_training(spec, on_progress=reports.append)
    return FinishedRun(table, spec, open_store(storage), result, reports, notes)


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 service (moto) over HTTP on loopback, ended by its own handle."""
    port = unused_port()
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "support" / "s3_service.py"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(f"{endpoint}/moto-api/", timeout=5)
                break
            except requests.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="maas")
        client.close()
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StorageSpec:
    """The description of an empty store of each kind."""
    if request.param == "file":
        return StorageSpec(uri=f"file://{tmp_path}/store")
    return StorageSpec(
        uri=f"s3://maas/{tmp_path.name}-{time.time_ns()}", endpoint=request.getfixturevalue("s3_endpoint")
    )


@pytest.fixture
def store(storage: StorageSpec) -> ObstoreStore:
    """An empty store of each kind."""
    return open_store(storage)


@pytest.fixture
def file_store(tmp_path: Path) -> ObstoreStore:
    """An empty store in a local directory, for tests in which the kind of store plays no part."""
    return open_store(f"file://{tmp_path}/store")


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nothing listens."""
    return unused_port()


@pytest.fixture(scope="module")
def module_port() -> int:
    """As `free_port`, for a server that a module's tests share."""
    return unused_port()
