"""maas-ray under test: a cluster of its own through the commands that a user types, or one plain uvicorn process."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from benchmarks.serving.commits import Code
from benchmarks.serving.peers import APPS, MODEL_NAME, Peer
from benchmarks.serving.processes import THREADS, Launch, Running, free_port

COMMAND_TIMEOUT_S = 240.0
CLUSTER = Peer("maas", "maas-ray: one pool, one replica of 1 CPU, behind HAProxy", "", (), lambda job: _no_launch(), has_binary=True)  # fmt: skip
SKETCH = Peer("sketch-replica", "a bare protocol class in a replica beside ours, behind the same HAProxy", "", (), lambda job: _no_launch())  # fmt: skip


def another_commit(name: str) -> Peer:
    """Ours as it was, or will be, under a name of `commits`."""
    return Peer(name, "the same at another commit", "", (), lambda job: _no_launch(), has_binary=True)


DIRECT = Peer(
    "maas-direct",
    "maas-ray's protocol class and app in one uvicorn process, nothing before it",
    "",
    (),
    lambda job: direct(job.model, job.directory),
    has_binary=True,
)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of one commit with one pool."""

    code: Code
    home: Path
    """Its state directory."""

    def deploy(self, model: Path, pool: dict[str, object] | None = None) -> Running:
        """Imports an ONNX file and serves it from one replica, in place of what the cluster served before.

        Args:
            model: the ONNX file.
            pool: further settings of the pool.
        """
        store = str(self.home.parent / "store")
        started = time.monotonic()
        name = f"{MODEL_NAME}-{model.stem}"
        self.command("import", str(model), "--name", name, "--alias", "production", "--store", store)
        # Commits of before 2026-12 have another name for it, and their rooms are not there.
        interval = "poll_interval_s" if (self.code.root / "maas_ray/serve/spec").is_dir() else "every_s"
        described = {
            "storage": {"uri": store},
            "http": {"port": self.running().port},
            # Nothing changes during a measurement: the registry is looked at once a minute.
            "pools": [{"models": [{"name": name}], "replicas": 1, "refresh": {interval: 60.0}, **(pool or {})}],
        }
        spec = self.home.parent / "pool.yaml"
        spec.write_text(yaml.safe_dump(described))
        self.command("serve", str(spec), "--state-dir", str(self.home))
        return self.running(f"/v2/models/{name}/infer", time.monotonic() - started)

    def running(self, path: str = "", start_s: float = 0.0) -> Running:
        """The cluster as a server under test."""
        # Not through `load_state`, which may refuse the record of another commit for a field that is not asked for.
        state = json.loads((self.home / "cluster.json").read_text())
        marker = state["cluster_id"]
        return Running(self.code.name, state["http_port"], path, marker, start_s, lambda line: "ServeReplica" in line)

    def command(self, *arguments: str) -> dict[str, object]:
        """Runs `maas-ray` of this commit; returns what it printed.

        Raises:
            RuntimeError: it failed; the message has its last words.
        """
        command = [str(self.code.python), "-m", "maas_ray.cli", *arguments, "--json"]
        # `-m` searches the working directory first, and Ray tells every worker to do the same.
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, cwd=self.code.root
        )
        if finished.returncode != 0:
            raise RuntimeError(f"maas-ray {arguments[0]} failed: {finished.stderr[-2000:]} {finished.stdout[-500:]}")
        document: dict[str, object] = json.loads(finished.stdout) if finished.stdout.strip() else {}
        return document


@contextlib.contextmanager
def cluster(directory: Path, num_cpus: int, code: Code) -> Iterator[Cluster]:
    """A cluster with a state directory of its own below `directory`; ended with all of its processes."""
    found = Cluster(code, directory / "home")
    home = str(found.home)
    found.command("up", "--state-dir", home, "--num-cpus", str(num_cpus), "--port", "0", "--dashboard-port", "0")
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            found.running().resume()
        found.command("down", "--state-dir", home, "--drain-timeout-s", "5")


@contextlib.contextmanager
def sketch(cluster: Cluster, model: Path) -> Iterator[Running]:
    """The bare protocol class in a replica of its own beside our pool: same cluster, same HAProxy."""
    path = "/sketch/infer"
    command = [sys.executable, str(APPS / "sketch_replica.py"), str(cluster.home)]
    env = {**os.environ, **THREADS, "BENCH_MODEL": str(model), "BENCH_PATH": path, "BENCH_PORT": "0"}
    subprocess.run([*command, "up"], check=True, timeout=COMMAND_TIMEOUT_S, env=env)
    try:
        yield replace(cluster.running(path), name=SKETCH.name)
    finally:
        cluster.running().resume()
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


def _no_launch() -> Launch:
    raise RuntimeError("maas runs in a cluster, see `Cluster`")
