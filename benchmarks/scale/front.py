"""HAProxy with many servers: size of its configuration, CPU of a reload, of health checks, and of what the keeper asks."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.scale import cpu
from maas_ray.cluster.node.environment import find_launcher
from maas_ray.haproxy.admin import ask, running_pid
from maas_ray.haproxy.binary import find_binary
from maas_ray.haproxy.config.harden import Options, harden
from maas_ray.haproxy.config.limits import PoolLimits, limits_file, write_limits
from maas_ray.haproxy.names import REPLAYABLE
from maas_ray.haproxy.silent import silent
from tests.conftest import unused_port
from tests.support.front import backend, render, until

CHECKED_S = 10.0
"""How long health checks are watched."""
SHAPES = ((1, 1), (1, 10), (1, 50), (1, 100), (1, 500), (1, 2000), (10, 50), (50, 10), (100, 1))
"""Pools, and replicas of each."""


@contextmanager
def listening(num_ports: int) -> Iterator[tuple[list[int], subprocess.Popen[str]]]:
    """Ports that answer health checks, and the process behind them, which counts its answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.scale.listeners", str(num_ports)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        yield json.loads(process.stdout.readline()), process
    finally:
        process.kill()
        process.communicate(timeout=20)


def num_answered(process: subprocess.Popen[str]) -> int:
    """Health checks that were answered so far."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


class Front:
    """One directory with Serve's configuration for pools; the launcher starts HAProxy as Serve does, without its actor."""

    def __init__(self, directory: Path, ports: list[int], num_pools: int) -> None:
        self.directory = directory / "node"
        self.directory.mkdir(parents=True)
        each = len(ports) // num_pools
        self.pools = [
            backend(f"pool-{number:03d}", REPLAYABLE, ports[number * each : (number + 1) * each])
            for number in range(num_pools)
        ]
        self.limits = {pool.app_name: PoolLimits(30.0, 30.0, 64 << 20) for pool in self.pools}
        write_limits(limits_file(self.directory / "haproxy.cfg"), self.limits)
        self._ports = {name: unused_port() for name in ("port", "stats_port", "metrics_port")}
        self._process: subprocess.Popen[bytes] | None = None

    def write(self) -> str:
        """Serve's file, by its own code."""
        return render(self.directory, self.pools, maxconn=2000, nbthread=1, timeout_server_s=660, **self._ports)

    def start(self) -> float:
        """Starts HAProxy or reloads the one that runs; returns the CPU time from the launcher to the first answer."""
        self.write()
        command = [find_launcher() or "", "-db", "-f", str(self.directory / "haproxy.cfg"), "-dR"]
        old = self._process
        if old:
            command += ["-sf", str(old.pid), "-x", str(self.directory / "admin.sock")]
        with (self.directory / "haproxy.log").open("ab") as log:
            self._process = process = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: running_pid(self.directory / "admin.sock", 10) == process.pid, "HAProxy", 120, 0.01)
        spent = cpu.of_process(process.pid, with_children=True)
        if old:
            old.wait(60)
        return spent

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait(20)


def configuration(directory: Path, num_pools: int, num_replicas: int) -> list[float]:
    """Bytes of the configuration; milliseconds of CPU of Serve's rendering, of hardening and of HAProxy's check."""
    front = Front(directory, list(range(20_000, 20_000 + num_pools * num_replicas)), num_pools)
    text = front.write()
    options = Options(limits=front.limits)
    hardened = harden(text, options)
    draft = front.directory / "draft.cfg"
    draft.write_text(hardened)
    check = [find_binary(), "-c", "-f", str(draft)]
    return [
        float(len(hardened)),
        cpu.of_call(front.write, 3) * 1e3,
        cpu.of_call(lambda: harden(text, options)) * 1e3,
        cpu.of_children(lambda: subprocess.run(check, check=True, capture_output=True, timeout=60)) * 1e3,
    ]


def running(directory: Path, num_replicas: int) -> list[float]:
    """Of a front that runs with one pool.

    Returns:
        Milliseconds of CPU of a reload; health checks per second; microseconds of HAProxy's CPU for each, and its share
        of a core; bytes of the keeper's question, milliseconds of CPU to read the answer in Python, and in HAProxy.
    """
    with listening(num_replicas) as (ports, replicas):
        front = Front(directory, ports, 1)
        try:
            front.start()
            reloads = sorted(front.start() for _ in range(3))
            time.sleep(3)  # the first checks of all servers
            before, count, began = cpu.of_process(front.pid), num_answered(replicas), time.monotonic()
            time.sleep(CHECKED_S)
            spent = cpu.of_process(front.pid) - before
            count = num_answered(replicas) - count
            span_s = time.monotonic() - began
            admin = front.directory / "admin.sock"
            statistics = ask(admin, "show stat -1 4 -1", 10) or ""
            reading = cpu.of_call(lambda: silent(statistics)) * 1e3
            before = cpu.of_process(front.pid)
            asked_from = time.monotonic()
            for _ in range(50):
                ask(admin, "show stat -1 4 -1", 10)
            idle = spent / span_s * (time.monotonic() - asked_from)
            answering = max(0.0, cpu.of_process(front.pid) - before - idle) / 50 * 1e3
            return [
                reloads[1] * 1e3, count / span_s, spent / count * 1e6, spent / span_s * 100,
                float(len(statistics)), reading, answering,
            ]  # fmt: skip
        finally:
            front.close()
            with suppress(OSError):
                os.unlink(front.directory / "admin.sock")
