"""HAProxy as Serve starts it, without Ray: what Serve renders, a stand-in for its manager, and servers that misbehave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, HAProxyManager, ServerConfig
from ray.serve.config import HTTPOptions

from maas_ray.cluster.node.environment import find_launcher
from maas_ray.haproxy import generations
from maas_ray.haproxy.admin import running_pid
from maas_ray.haproxy.config.limits import PoolLimits, limits_file, write_limits
from maas_ray.haproxy.names import KEEPER_SOCKET, REPLAYABLE
from maas_ray.haproxy.succession import MANAGER_TITLE, wake_keeper
from tests.conftest import unused_port

# Starts the launcher as Serve's actor does, once for each line it reads, and tells who it is and who it started.
MANAGER = """
import subprocess, sys
log = open(sys.argv[1], "ab")
children = []
for line in sys.stdin:
    children.append(subprocess.Popen(line.split(), stdout=log, stderr=log))
    print(children[-1].pid, flush=True)
    [child.poll() for child in children]
"""

REPLICA = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Replica(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b"success" if self.path == "/-/healthz" else json.dumps({"pid": os.getpid()}).encode())
    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        time.sleep(float(self.path.rpartition("wait=")[2] or 0) if "wait=" in self.path else 0)
        self.answer(json.dumps({"pid": os.getpid()}).encode())
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Replica).serve_forever()
"""


def backend(app: str, deployment: str, ports: Sequence[int]) -> BackendConfig:
    """As `HAProxyManager` makes it from the controller's targets."""
    names = [f"SERVE_REPLICA::{app}#{deployment}#ab12cd3{index}" for index in range(len(ports))]
    servers = [
        ServerConfig(name=HAProxyManager.get_safe_name(name), host="127.0.0.1", port=port)
        for name, port in zip(names, ports, strict=True)
    ]
    return BackendConfig(name=f"http-{app}", path_prefix=f"/{app}", app_name=app, servers=servers)


def render(directory: Path, backends: list[BackendConfig], port: int = 8000, host: str = "127.0.0.1", **options: Any) -> str:  # fmt: skip
    """What Serve writes, by its own code."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=port),
        is_head=True,
        socket_path=str(directory / "admin.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "server-state"),
        metrics_socket_path=str(directory / "metrics.sock"),
        **options,
    )
    api = HAProxyApi(config, config_file_path=str(directory / "haproxy.cfg"))
    api.set_backend_configs({item.name: item for item in backends})
    api._generate_config_file_internal()
    return (directory / "haproxy.cfg").read_text()


def start_replica(port: int) -> subprocess.Popen[bytes]:
    """A server that answers with its pid; a path that ends in `wait=<seconds>` takes so long."""
    process = subprocess.Popen([sys.executable, "-c", REPLICA, str(port)], stderr=subprocess.DEVNULL)
    until(lambda: requests.get(f"http://127.0.0.1:{port}/-/healthz", timeout=2).ok, "a server")
    return process


def until(is_done: Callable[[], Any], what: str, timeout_s: float = 20.0, every_s: float = 0.02) -> Any:
    """Waits; an error of the network is a no."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(OSError):
            if found := is_done():
                return found
        assert time.monotonic() < deadline, f"{what} was not there within {timeout_s:g} s"
        time.sleep(every_s)


@dataclass
class Manager:
    """A process that has the name of Serve's manager, starts HAProxy as it does and knows the pids of what it started."""

    front: "Front"
    process: subprocess.Popen[str] = field(init=False)
    haproxy: int = 0

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [MANAGER_TITLE, "-c", MANAGER, str(self.front.directory / "haproxy.log")],
            executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def start(self, pools: list[BackendConfig] | None = None) -> int:
        """Writes a configuration and starts HAProxy with it, or reloads the one that runs; returns the pid."""
        front = self.front
        render(
            front.directory, front.pools if pools is None else pools, port=front.port, stats_port=front.stats_port,
            metrics_port=front.metrics_port, maxconn=200, nbthread=1, retries=3, timeout_server_s=660, **front.options,
        )  # fmt: skip
        arguments = [find_launcher(), "-db", "-f", str(front.directory / "haproxy.cfg"), "-dR"]
        if self.haproxy:
            arguments += ["-sf", str(self.haproxy), "-x", str(front.directory / "admin.sock")]
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(" ".join(map(str, arguments)) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        try:
            until(lambda: running_pid(front.directory / "admin.sock") == pid, "HAProxy")
        except AssertionError as error:
            raise AssertionError((front.directory / "haproxy.log").read_text()) from error
        self.haproxy = pid
        return pid

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@dataclass
class Front:
    """One directory of a front, its replicas and its managers."""

    directory: Path
    num_replicas: int = 2
    deployment: str = REPLAYABLE
    limits: PoolLimits | None = None
    port: int = field(default_factory=unused_port)
    stats_port: int = field(default_factory=unused_port)
    metrics_port: int = field(default_factory=unused_port)
    options: dict[str, Any] = field(default_factory=dict)
    """Further ones of Serve's configuration."""

    def __post_init__(self) -> None:
        self.directory = self.directory / "node"
        self.directory.mkdir(exist_ok=True)
        self.ports = [unused_port() for _ in range(self.num_replicas)]
        self.replicas = [start_replica(port) for port in self.ports]
        self.pools = [backend("pool", self.deployment, self.ports)]
        if self.limits is not None:
            write_limits(limits_file(self.directory / "haproxy.cfg"), {"pool": self.limits})
        self.managers: list[Manager] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def manager(self) -> Manager:
        self.managers.append(Manager(self))
        return self.managers[-1]

    def pid(self) -> int | None:
        """Of the HAProxy that answers."""
        return running_pid(self.directory / "admin.sock")

    def answers(self) -> bool:
        return requests.post(f"{self.url}/pool/x", data=b"1", timeout=5).status_code == 200

    def keeper(self) -> bool:
        return (self.directory / KEEPER_SOCKET).exists()

    def log(self) -> str:
        return (self.directory / "keeper.log").read_text()

    def close(self) -> None:
        """Ends everything; the keeper is the last one to leave."""
        for manager in self.managers:
            manager.end()
        with suppress(AssertionError):
            until(lambda: self.pid() is None or wake_keeper(self.directory, b"drain"), "the keeper", 5)
        for generation in generations.recorded(self.directory):
            generation.process.send(signal.SIGKILL)
        for replica in self.replicas:
            with suppress(ProcessLookupError):
                os.kill(replica.pid, signal.SIGCONT)
            replica.kill()
            replica.wait(20)
        until(lambda: not self.keeper(), "the end of the keeper", 40)


def body(answer: requests.Response) -> Any:
    """The JSON of an answer."""
    return json.loads(answer.content)
