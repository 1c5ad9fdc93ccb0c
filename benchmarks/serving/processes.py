"""A server under test: started, paused while another one is measured, ended whatever happens. Knows no protocol.

All of its processes carry one variable in their environment (see maas_ray.cluster.node.processes), so that daemons are
paused and ended with the rest, and nothing else is.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests

from maas_ray.cluster.node.processes import MARKER, end_processes, find_processes, psutil

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


__all__ = ["THREADS", "Launch", "Running", "clean_environment", "free_port", "psutil", "run"]


@dataclass(frozen=True)
class Launch:
    """How a server is started and asked."""

    argv: list[str]
    port: int
    path: str
    """Of the prediction, below the root."""
    ready_path: str
    """Answers 200 once the model is there."""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    start_timeout_s: float = 120.0


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    name: str
    port: int
    path: str
    cluster_id: str
    """Value of the variable that its processes carry."""
    start_s: float
    """Seconds from its start to the first answer of the ready path."""
    replica: Callable[[str], bool] = lambda command: True
    """Which of its processes, by command line, holds the model."""
    can_pause: bool = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def pause(self) -> None:
        """Stops all of its processes: what runs in the background of an idle server is not taken from another's turn."""
        if self.can_pause:
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds used so far by its living processes."""
        return sum(sum(process.cpu_times()[:2]) for process in find_processes(self.cluster_id))

    def memory(self) -> dict[str, object]:
        """Bytes of the process that holds the model (the largest such one), and whether torch is mapped into it."""
        found = [process for process in find_processes(self.cluster_id) if self.replica(" ".join(process.cmdline()))]
        sizes = {process.pid: process.memory_full_info() for process in found}
        pid = max(sizes, key=lambda pid: sizes[pid].rss)
        return {
            "rss_bytes": sizes[pid].rss,
            "uss_bytes": sizes[pid].uss,
            "all_processes_uss_bytes": sum(p.memory_full_info().uss for p in find_processes(self.cluster_id)),
            "has_torch": "libtorch" in Path(f"/proc/{pid}/maps").read_text(),
        }

    def _signal(self, number: int) -> None:
        for process in find_processes(self.cluster_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


@contextlib.contextmanager
def run(name: str, launch: Launch, log_path: Path) -> Iterator[Running]:
    """Starts a server, waits until it is ready, and ends all of its processes at the end.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has the end of its log.
    """
    marker = secrets.token_hex(16)
    started = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            launch.argv,
            env={**clean_environment(), **THREADS, **launch.env, MARKER: marker},
            cwd=launch.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{launch.port}{launch.ready_path}"
        while not _answers(url):
            if process.poll() is not None or time.monotonic() - started > launch.start_timeout_s:
                raise RuntimeError(f"{name} is not ready: {log_path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield Running(name, launch.port, launch.path, marker, time.monotonic() - started)
    finally:
        for one in find_processes(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGCONT)
        end_processes(marker, grace_s=5)
        process.wait(10)


def free_port() -> int:
    """A port that was free a moment ago, below the range of outgoing connections."""
    for port in range(18_000 + secrets.randbelow(1000), 20_000):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port
    raise RuntimeError("no free port between 18000 and 20000")


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).status_code == 200
    except requests.RequestException:
        return False


def clean_environment() -> dict[str, str]:
    """Ours without what would steer the interpreter or the Ray of another environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV"))}
