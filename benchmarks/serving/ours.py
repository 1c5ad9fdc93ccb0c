"""maas-ray as a peer: a cluster of its own through the commands that a user types, or one plain uvicorn process."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from benchmarks.serving.peers import APPS, MODEL_NAME, Peer
from benchmarks.serving.processes import THREADS, Launch, Running, free_port
from maas_ray.cluster import load_state

COMMAND_TIMEOUT_S = 240.0
CLUSTER = Peer("maas", "maas-ray: one pool, one replica of 1 CPU, behind HAProxy", "", (), lambda job: _no_launch(), has_binary=True)  # fmt: skip
SKETCH = Peer("sketch-replica", "a bare protocol class in a replica beside ours, behind the same HAProxy", "", (), lambda job: _no_launch())  # fmt: skip
DIRECT = Peer(
    "maas-direct",
    "maas-ray's protocol class and app in one uvicorn process, nothing before it",
    "",
    (),
    lambda job: direct(job.model, job.directory),
    has_binary=True,
)


@contextlib.contextmanager
def cluster(directory: Path, num_cpus: int) -> Iterator[Path]:
    """A cluster with a state directory of its own, which is yielded; ended with all of its processes."""
    home = directory / "home"
    _command("up", "--state-dir", str(home), "--num-cpus", str(num_cpus), "--port", "0", "--dashboard-port", "0")
    try:
        yield home
    finally:
        with contextlib.suppress(RuntimeError):
            running(home).resume()
        _command("down", "--state-dir", str(home), "--drain-timeout-s", "5")


def deploy(home: Path, model: Path, pool: dict[str, object] | None = None) -> Running:
    """Imports an ONNX file and serves it from one replica, in place of what the cluster served before.

    Args:
        home: the cluster's state directory.
        model: the ONNX file.
        pool: further settings of the pool.
    """
    store = str(home.parent / "store")
    started = time.monotonic()
    name = f"{MODEL_NAME}-{model.stem}"
    _command("import", str(model), "--name", name, "--alias", "production", "--store", store)
    described = {
        "storage": {"uri": store},
        "http": {"port": running(home).port},
        # Nothing changes during a measurement: the registry is looked at once a minute.
        "pools": [{"models": [{"name": name}], "replicas": 1, "refresh": {"every_s": 60.0}, **(pool or {})}],
    }
    spec = home.parent / "pool.yaml"
    spec.write_text(yaml.safe_dump(described))
    _command("serve", str(spec), "--state-dir", str(home))
    return running(home, f"/v2/models/{name}/infer", time.monotonic() - started)


def running(home: Path, path: str = "", start_s: float = 0.0) -> Running:
    """The cluster as a server under test."""
    state = load_state(home)
    if state is None:
        raise RuntimeError(f"no cluster is recorded in {home}")
    return Running("maas", state.http_port, path, state.cluster_id, start_s, lambda command: "ServeReplica" in command)


@contextlib.contextmanager
def sketch(home: Path, model: Path) -> Iterator[Running]:
    """The bare protocol class in a replica of its own beside our pool: same cluster, same HAProxy."""
    path = "/sketch/infer"
    command = [sys.executable, str(APPS / "sketch_replica.py"), str(home)]
    env = {**os.environ, **THREADS, "BENCH_MODEL": str(model), "BENCH_PATH": path, "BENCH_PORT": "0"}
    subprocess.run([*command, "up"], check=True, timeout=COMMAND_TIMEOUT_S, env=env)
    try:
        yield replace(running(home, path), name=SKETCH.name)
    finally:
        running(home).resume()
        subprocess.run([*command, "down"], check=True, timeout=COMMAND_TIMEOUT_S, env=env)


def direct(model: Path, directory: Path) -> Launch:
    """The serving code without Ray and HAProxy, for what the duties of a server cost."""
    port = free_port()
    argv = [sys.executable, str(APPS / "direct_app.py"), str(model), str(directory / "store"), str(port)]
    root = Path(__file__).parents[2]
    return Launch(
        argv, port, f"/v2/models/{MODEL_NAME}/infer", f"/v2/models/{MODEL_NAME}/ready", {"PYTHONPATH": str(root)}
    )


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for Unix sockets below it; removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="mb-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _command(*arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "maas_ray.cli", *arguments, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if finished.returncode != 0:
        raise RuntimeError(f"maas-ray {arguments[0]} failed: {finished.stderr[-2000:]} {finished.stdout[-500:]}")
    document: dict[str, object] = json.loads(finished.stdout) if finished.stdout.strip() else {}
    return document


def _no_launch() -> Launch:
    raise RuntimeError("maas runs in a cluster, see `deploy`")
