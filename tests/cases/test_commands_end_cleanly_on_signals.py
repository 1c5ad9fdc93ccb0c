"""Every command × every signal that asks it to end × early and late: undone or finished, and said in one line."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from maas_ray.registry.models import Registry
from maas_ray.store.objects import open_store
from tests.conftest import RayCluster
from tests.serve.conftest import publish
from tests.support.interrupted import ROOT, SIGNALS, Command
from tests.support.onnx_models import commit_bundle, linear

COMMANDS = {
    "up": ["--num-cpus", "1", "--port", "0", "--dashboard-port", "0"],
    "down": [],
    "status": [],
    "doctor": [],
    "quickstart": [],
    "data": ["SPEC"],
    "train": ["SPEC"],
    "runs": [],
    "evaluate": ["run"],
    "publish": ["run", "--name", "m"],
    "import": ["FILE", "--name", "m"],
    "tune": ["SPEC"],
    "lr-range": ["SPEC"],
    "compare": ["run"],
    "cv": ["SPEC"],
    "promote": ["m", "1"],
    "models": [],
    "serve": ["SPEC"],
    "unserve": [],
    "predict": ["m", "--input", "FILE"],
    "verify-parallel": ["SPEC"],
    "fsck": [],
    "compact": [],
    "schema": [],
}
JOBS = {
    "train": ["--spec", "SPEC"],
    "tune": ["--spec", "SPEC"],
    "publish": ["--store", "s3://b/x", "--run", "r", "--name", "m"],
    "evaluate": ["--store", "s3://b/x", "--run", "r"],
}
by_name = {"ids": lambda value: value.name if isinstance(value, signal.Signals) else str(value)}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment without a cluster."""
    (tmp_path / "spec.yaml").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(linear())
    return {"MAAS_RAY_HOME": str(tmp_path / "state"), "MAAS_RAY_STORE": f"file://{tmp_path}/store"}


def arguments(of: list[str], directory: Path) -> list[str]:
    files = {"SPEC": str(directory / "spec.yaml"), "FILE": str(directory / "model.onnx")}
    return [files.get(word, word) for word in of]


def test_the_table_holds_every_command() -> None:
    from maas_ray.cli.app import PANELS

    known = {command.__name__.rstrip("_").replace("_", "-") for panel in PANELS.values() for command in panel}
    assert set(COMMANDS) == known | {"quickstart"}
    assert set(JOBS) == {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"pipeline", "keras_digits"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_has_just_started_changes_nothing(name: str, home: dict[str, str], tmp_path: Path) -> None:
    number = SIGNALS[sorted(COMMANDS).index(name) % len(SIGNALS)]
    command = Command(name, *arguments(COMMANDS[name], tmp_path), env=home).when_it_heeds()
    command.send(number).end().said(number)
    assert not (tmp_path / "state" / "cluster.json").exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", JOBS)
def test_a_stopped_job_reports_what_remains(name: str, home: dict[str, str], tmp_path: Path) -> None:
    script = str(ROOT / "jobs" / f"{name}.py")
    # No head answers there, so it is still waiting for one.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {**home, "RAY_ADDRESS": f"127.0.0.1:{silent.getsockname()[1]}", **AWS}
        command = Command(script, *arguments(JOBS[name], tmp_path), env=env).when_it_heeds()
        silent.settimeout(60)
        silent.accept()[0].close()
        line = command.send(signal.SIGTERM).end().said(signal.SIGTERM)
    assert "submit the job again" in line


AWS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


@pytest.mark.parametrize(
    ("name", "number"),
    [("models", signal.SIGINT), ("publish", signal.SIGTERM), ("import", signal.SIGINT), ("fsck", signal.SIGHUP)],
    **by_name,
)
def test_a_store_that_does_not_answer_blocks_no_command(
    name: str, number: signal.Signals, home: dict[str, str], tmp_path: Path
) -> None:
    """Python runs no handler there: the call is Rust's."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = ["--store", "s3://b/x", "--endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        command = Command(name, *arguments(COMMANDS[name], tmp_path), *options, env={**home, **AWS})
        silent.settimeout(60)
        with silent.accept()[0]:
            line = command.send(number).end(60).said(number)
    assert "was ended after 5 s" in line
    assert "run the command again" in line


def test_signals_that_were_ignored_from_the_start_stay_ignored(home: dict[str, str]) -> None:
    """`nohup maas-ray … &`."""
    script = "import signal, os, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, '-m', 'maas_ray.cli', 'schema'])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, **home, "PYTHONPATH": str(ROOT)}
    )
    for _ in range(10):
        process.send_signal(signal.SIGHUP) if _ignores(process.pid) else None
        try:
            process.wait(0.3)
            break
        except subprocess.TimeoutExpired:
            continue
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"properties" in stdout


def _ignores(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigIgn")]
    return bool(mask >> (signal.SIGHUP - 1) & 1)


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["table", "json"])
def test_closed_output_ends_a_command_without_a_traceback(
    option: list[str], home: dict[str, str], tmp_path: Path
) -> None:
    """`maas-ray models | head -1`."""
    store = open_store(f"file://{tmp_path}/store")
    bundle = commit_bundle(store)
    registry = Registry(store)
    for index in range(60):
        registry.publish(f"model-{index}-{'x' * 60}", bundle)
    command = Command("models", *option, env=home)
    assert command.process.stdout is not None
    command.process.stdout.close()
    command.process.stdout = None
    ended = command.end()
    assert ended.code == 128 + signal.SIGPIPE
    assert ended.stderr == f"store {store.uri}\n"


# Commands of a cluster


@pytest.fixture
def pool_spec(ray_cluster: RayCluster, tmp_path: Path) -> Iterator[str]:
    store = open_store(f"file://{tmp_path}/store")
    publish(store, "linear", commit_bundle(store))
    pool = {"name": "slow", "route_prefix": "/slow", "models": [{"name": "linear"}], "resources": {"cpus": 0.1}}
    spec = {"storage": {"uri": store.uri}, "http": {"port": ray_cluster.http_port}, "pools": [pool]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(spec))
    yield str(tmp_path / "serve.yaml")
    from maas_ray.serve.deploy import pool as pools

    pools.undeploy([each.name for each in pools.status(["slow"])])


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], **by_name)
def test_serve_reports_that_the_cluster_continues_the_deployment(
    number: signal.Signals, ray_cluster: RayCluster, pool_spec: str
) -> None:
    """SIGTERM: after Ray has put a handler of C++ in place of Python's, which prints a native trace."""
    from maas_ray.serve.deploy import pool as pools

    command = Command("serve", pool_spec, env=ray_cluster.env).when(lambda: pools.status(["slow"]))
    line = command.send(number).end().said(number)
    assert "continues to deploy slow" in line
    # What the line says is so.
    again = Command("serve", pool_spec, env=ray_cluster.env).end()
    assert again.code == 0, again.stderr
    assert "RUNNING" in again.stdout


TRAINED = {"run": "stopped", "epochs": 100_000, "workers.count": 1}


@pytest.mark.parametrize("kind", ["command", pytest.param("job", marks=pytest.mark.fault)])
def test_training_commits_first_and_a_stop_has_its_exit_code(
    kind: str, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """Ctrl-C at `maas-ray train`, and `ray job stop` of jobs/train.py: both mean the same."""
    number = signal.SIGINT if kind == "command" else signal.SIGTERM
    spec = str(ROOT / "jobs" / "specs" / "digits.yaml")
    options = [f"storage.uri=file://{tmp_path}/store", *(f"{name}={value}" for name, value in TRAINED.items())]
    settings = [word for option in options for word in ("--set", option)]
    if kind == "command":
        command = Command("train", spec, *settings, env=ray_cluster.env)
    else:
        command = Command(str(ROOT / "jobs" / "train.py"), "--spec", spec, *settings, env=ray_cluster.env)
    checkpoints = tmp_path / "store" / "runs" / "stopped" / "checkpoints"
    command.when(lambda: list(checkpoints.glob("*/manifest.json")), timeout_s=240)
    ended = command.send(number).end(180)
    assert ended.code == 128 + number, ended.stderr
    assert f"run 'stopped' was asked to end ({number.name}); step" in ended.stderr
    assert "is committed" in ended.stderr
    assert "Traceback" not in ended.stderr


# Commands that start and end a cluster of their own


def processes(home: dict[str, str]) -> list[str]:
    """Names of what runs of the recorded cluster."""
    from maas_ray.cluster.node.processes import find_processes, process_name

    try:
        record = json.loads(Path(home["MAAS_RAY_HOME"], "cluster.json").read_text())
    except OSError:
        return []
    home["cluster_id"] = record["cluster_id"]
    return [process_name(process) for process in find_processes(record["cluster_id"])]


def assert_nothing_is_left(home: dict[str, str]) -> None:
    from maas_ray.cluster.node.processes import find_processes

    assert find_processes(home["cluster_id"]) == []
    assert {path.name for path in Path(home["MAAS_RAY_HOME"]).iterdir()} <= {"lock"}


UP = ["up", *COMMANDS["up"]]


@pytest.fixture
def short_home(home: dict[str, str]) -> Iterator[dict[str, str]]:
    yield home
    env = {name: value for name, value in home.items() if name.isupper()}
    Command("down", "--drain-timeout-s", "0", env=env).end()


TERM = pytest.param((signal.SIGTERM,), id="term")


@pytest.mark.parametrize(
    "numbers", [TERM, pytest.param((signal.SIGINT, signal.SIGINT), id="int twice", marks=pytest.mark.fault)]
)
def test_up_that_is_interrupted_ends_what_it_has_started(
    numbers: tuple[signal.Signals, ...], short_home: dict[str, str]
) -> None:
    home = short_home
    command = Command(*UP, env=home).when(lambda: "gcs_server" in processes(home))
    line = command.send(*numbers).end().said(numbers[-1])
    assert line == "all started processes have ended; run `maas-ray up` again"
    assert_nothing_is_left(home)


@pytest.mark.parametrize(
    "numbers", [TERM, pytest.param((signal.SIGINT,) * 3, id="int thrice", marks=pytest.mark.fault)]
)
def test_down_that_is_interrupted_ends_the_cluster_all_the_same(
    numbers: tuple[signal.Signals, ...], short_home: dict[str, str]
) -> None:
    home = short_home
    started = Command(*UP, env=home).end()
    assert started.code == 0, started.stderr
    assert "raylet" in processes(home)
    command = Command("down", env={name: value for name, value in home.items() if name.isupper()})
    line = command.when_it_heeds().when(lambda: _has_lock(home)).send(*numbers).end().said(numbers[-1])
    assert line.startswith("no process of the cluster remains")
    assert_nothing_is_left(home)


def _has_lock(home: dict[str, str]) -> bool:
    """Whether `down` is past its start: it holds the lock of the directory."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(Path(home["MAAS_RAY_HOME"], "lock"), timeout=0):
            return False
    except Timeout:
        return True
