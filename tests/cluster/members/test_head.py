"""Clusters from start to end: their record, the refused starts, and the removal of everything."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import requests

from maas_ray import cluster
from maas_ray.cluster.connection import check_head
from maas_ray.cluster.node.environment import is_free
from maas_ray.cluster.node.processes import find_processes
from maas_ray.cluster.node.state import save_state
from maas_ray.errors import ClusterError
from tests.support.listening import listening_outside_loopback

SERVE_HELLO = """
import sys
from maas_ray.cluster import connect
connect(state_dir=sys.argv[1])
from ray import serve
@serve.deployment
def hello(request):
    return "hello"
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(hello.bind())
"""


@pytest.fixture
def state_dir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="state-"))
    yield directory
    cluster.down(state_dir=directory, drain_timeout_s=0, grace_s=0)
    shutil.rmtree(directory)


def test_only_its_user_can_read_the_record_of_a_cluster(ray_cluster):
    directory = ray_cluster.state_dir
    for name in ("cluster.json", "token", "env.sh"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600
    assert ray_cluster.token not in (directory / "cluster.json").read_text() + (directory / "env.sh").read_text()


def test_a_second_cluster_of_a_directory_is_refused(ray_cluster):
    with pytest.raises(ClusterError, match="already running"):
        cluster.up(num_cpus=2, state_dir=ray_cluster.state_dir)


def test_without_a_record_there_is_no_cluster_to_end_or_to_connect_to(state_dir: Path):
    assert not cluster.down(state_dir=state_dir)
    assert not cluster.status(state_dir=state_dir).is_running
    with pytest.raises(ClusterError, match="no cluster is recorded"):
        cluster.connect(state_dir=state_dir)


@pytest.mark.fault
def test_a_cluster_is_used_and_ended_with_everything_that_it_started(state_dir: Path):
    """The commands of the tutorial, after which nothing remains; tests/integration has the complete pipeline."""
    state = cluster.up(num_cpus=2, profile="fast", state_dir=state_dir, ports=cluster.choose_ports(http=0, dashboard=0))
    assert listening_outside_loopback(state_dir) == set()
    client_environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", SERVE_HELLO, str(state_dir), str(state.http_port)]
    subprocess.run(command, env=client_environment, check=True, timeout=120, capture_output=True)
    assert requests.get(state.http_url, timeout=20).text == "hello"
    assert listening_outside_loopback(state_dir) == set(), "the replica, its front and their statistics included"
    # A shell of its user: env.sh alone makes Ray's own programs find the cluster and be let in.
    line = (
        f". {state_dir}/env.sh; {sys.executable} -c 'import ray; ray.init(); print(ray.cluster_resources()[\"CPU\"])'"
    )
    shell = ["/bin/bash", "-c", line]
    printed = subprocess.run(shell, env=client_environment, check=True, timeout=120, capture_output=True, text=True)
    assert printed.stdout.split()[-1] == "2.0"
    assert cluster.status(state_dir=state_dir).applications == {"default": "RUNNING"}
    names = {process.name() for process in find_processes(state.cluster_id)}
    assert {"haproxy", "raylet", "gcs_server"} <= names

    assert cluster.down(state_dir=state_dir)
    assert find_processes(state.cluster_id) == []
    assert is_free(state.http_port)
    assert not Path(state.temp_dir).exists()
    assert {path.name for path in state_dir.iterdir()} <= {"lock"}


def test_a_failed_start_reports_the_reason_and_leaves_nothing(state_dir: Path):
    environment = {"RAY_START_HOOK": "no_such_module.Hook"}
    temp_dir = Path(tempfile.mkdtemp(prefix="m"))
    ports = cluster.choose_ports(http=0, dashboard=0)
    with pytest.raises(ClusterError, match=r"Ray did not start; .*no_such_module"):
        cluster.up(num_cpus=1, state_dir=state_dir, env=environment, ports=ports, temp_dir=temp_dir)
    assert {path.name for path in state_dir.iterdir()} <= {"lock"}
    assert not temp_dir.exists()


def test_only_processes_of_the_cluster_are_ended(state_dir: Path):
    """The record of a cluster whose machine was switched off: other processes may have its pids now."""
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    member = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MAAS_RAY_CLUSTER_ID": "abandoned"},
    )
    try:
        assert member.stdout is not None
        member.stdout.readline()  # it ignores SIGTERM from here on
        temp_dir = state_dir / "temp"
        temp_dir.mkdir()
        save_state(state_dir, _record(cluster_id="abandoned", temp_dir=str(temp_dir)))
        assert cluster.down(state_dir=state_dir, drain_timeout_s=1, grace_s=0.5)
        assert find_processes("abandoned") == []
        assert member.poll() is not None
        assert stranger.poll() is None
        assert not temp_dir.exists()
    finally:
        for process in (stranger, member):
            process.kill()
            process.communicate()


def test_a_cluster_that_does_not_answer_is_reported_within_the_deadline(state_dir: Path):
    temp_dir = state_dir / "temp"
    temp_dir.mkdir()
    (state_dir / "token").write_text("secret")
    save_state(state_dir, _record(cluster_id="dead", temp_dir=str(temp_dir), token_path=str(state_dir / "token")))
    assert "did not answer" in cluster.status(state_dir=state_dir).detail
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9 does not answer"):
        check_head("127.0.0.1:9", timeout_s=2)


def test_a_wrong_token_is_refused_as_such(ray_cluster, state_dir: Path):
    (state_dir / "wrong").write_text("0" * 64)
    script = f"from maas_ray.cluster import connect; connect(address={ray_cluster.address!r}, timeout_s=20)"
    environment = {**os.environ, **ray_cluster.env, "RAY_AUTH_TOKEN_PATH": str(state_dir / "wrong")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "rejected the token" in done.stderr.splitlines()[-1]


def test_a_connected_process_is_not_moved_to_another_cluster(ray_cluster, state_dir: Path):
    assert cluster.connect(state_dir=ray_cluster.state_dir) == ray_cluster.address
    with pytest.raises(ClusterError, match=f"connected to {ray_cluster.address}, not to 127"):
        cluster.connect(address="127.0.0.1:9")


def test_a_damaged_record_is_reported(state_dir: Path):
    (state_dir / "cluster.json").write_text('{"version": 1, "address"')
    with pytest.raises(ClusterError, match=r"cluster\.json"):
        cluster.status(state_dir=state_dir)
    (state_dir / "cluster.json").unlink()


def test_a_port_in_use_is_refused_by_name(ray_cluster):
    port = int(ray_cluster.dashboard_url.rpartition(":")[2])
    with pytest.raises(ClusterError, match=f"the dashboard port {port} is in use"):
        cluster.choose_ports(dashboard=port)


def test_ports_of_one_cluster_are_all_different():
    chosen = cluster.choose_ports(http=0, dashboard=0)
    assert len(set(asdict(chosen).values())) == len(asdict(chosen))


def test_chosen_ports_are_reserved_while_the_result_exists():
    """Their listeners start later: a second cluster must not choose the same ports meanwhile."""
    held: list[cluster.Ports] = []
    with pytest.raises(ClusterError, match="consecutive free ports"):
        for _ in range(100):
            held.append(cluster.choose_ports(http=0, dashboard=0))
    assert len({ports.gcs for ports in held}) == len(held) > 1
    other = "from maas_ray import cluster; cluster.choose_ports(http=0, dashboard=0)"
    command = [sys.executable, "-P", "-c", other]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "consecutive free ports" in refused.stderr
    held.clear()
    subprocess.run(command, check=True, timeout=60)


def _record(*, cluster_id: str, temp_dir: str, token_path: str = "/nonexistent") -> cluster.ClusterState:
    return cluster.ClusterState(
        cluster_id=cluster_id,
        profile="fast",
        address="127.0.0.1:9",
        dashboard_url="http://127.0.0.1:9",
        http_port=9,
        token_path=token_path,
        temp_dir=temp_dir,
        started_s=0.0,
        environment={"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    )
