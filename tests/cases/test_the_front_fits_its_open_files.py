"""HAProxy gets as many connections as the open files of its process allow, and reports the reason if too few."""

import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maas_ray.cluster.node.environment import find_launcher
from maas_ray.haproxy.admin import ask
from maas_ray.haproxy.config.capacity import MIN_CONNECTIONS, Capacity, TooFewFiles, capacity, read_capacities
from maas_ray.haproxy.config.sections import Unexpected
from maas_ray.haproxy.names import REFUSED_FILE, REPLAYABLE
from maas_ray.process.open_files import UNLIMITED
from tests.conftest import unused_port
from tests.support.front import backend, render, start_replica, until

WANTED = 20_000


def _config(directory: Path, ports: list[int], port: int | None = None) -> str:
    directory.mkdir(exist_ok=True)
    pools = [backend("pool", REPLAYABLE, ports)]
    return render(
        directory, pools, port=port or unused_port(), stats_port=unused_port(), metrics_port=unused_port(), maxconn=WANTED,
        nbthread=4,
    )  # fmt: skip


def _launch(directory: Path, open_files: int) -> subprocess.Popen[str]:
    """As Serve starts it, on a node with this hard limit and a lower soft one."""
    launcher = find_launcher()
    assert launcher is not None
    command = [launcher, "-db", "-f", str(directory / "haproxy.cfg"), "-dR"]
    limited = f"import os, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (min({open_files}, 256), {open_files})); os.execv({launcher!r}, {command!r})"
    return subprocess.Popen([sys.executable, "-c", limited], stderr=subprocess.PIPE, text=True)


def _info(directory: Path) -> dict[str, int]:
    lines = [line.partition(": ") for line in (ask(directory / "admin.sock", "show info") or "").splitlines()]
    return {name: int(value) for name, _, value in lines if value.isdecimal()}


@pytest.mark.parametrize("open_files", [512, 1024, 4096])
def test_the_front_starts_with_few_open_files_and_reports_its_number_of_connections(
    tmp_path: Path, open_files: int
) -> None:
    inner, port = unused_port(), unused_port()
    replica = start_replica(inner)
    directory = tmp_path / "node"
    _config(directory, [inner], port)
    process = _launch(directory, open_files)
    callers: list[socket.socket] = []
    try:
        found = until(lambda: process.poll() is None and _info(directory), "HAProxy")
        assert MIN_CONNECTIONS <= found["Maxconn"] < open_files / 2
        assert found["Maxsock"] <= open_files
        assert found["Maxconn"] > 0.85 * (open_files / 2 - 96), "not many fewer than possible"
        (said,) = read_capacities(tmp_path)
        assert (said.max_connections, said.wanted_connections, said.open_files) == (
            found["Maxconn"],
            WANTED,
            open_files,
        )
        assert said.is_reduced
        # All of them concurrently, each with a response of the replica and without an error of the front.
        for _ in range(min(300, found["Maxconn"])):
            caller = socket.create_connection(("127.0.0.1", port), timeout=10)
            callers.append(caller)
            caller.sendall(b"GET /pool/x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert {caller.recv(12) for caller in callers} == {b"HTTP/1.1 200"}
    finally:
        for caller in callers:
            caller.close()
        process.terminate()
        _, printed = process.communicate(timeout=20)
        replica.kill()
        replica.wait(20)
    assert f"instead of {WANTED}, because it may have {open_files} open files" in printed


def test_too_few_files_are_refused_with_the_reason_next_to_the_configuration(tmp_path: Path) -> None:
    directory = tmp_path / "node"
    _config(directory, [unused_port()])
    began = time.monotonic()
    process = _launch(directory, 200)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 1
    assert time.monotonic() - began < 20
    reason = (directory / REFUSED_FILE).read_text()
    assert reason.strip() in printed
    for words in ("may have 200 open files", "it needs ", "ulimit -Hn"):
        assert words in reason
    # With more files it starts, and the reason is gone.
    process = _launch(directory, 1024)
    try:
        until(lambda: process.poll() is None and _info(directory), "HAProxy")
        assert not (directory / REFUSED_FILE).exists()
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_the_number_in_the_refusal_is_sufficient(tmp_path: Path) -> None:
    config = _config(tmp_path, [unused_port() for _ in range(7)])
    with pytest.raises(TooFewFiles) as caught:
        capacity(config, 100)
    least = int(str(caught.value).partition("it needs ")[2].partition(":")[0])
    assert capacity(config, least).max_connections >= MIN_CONNECTIONS
    with pytest.raises(TooFewFiles):
        capacity(config, least - 40)


def test_with_enough_open_files_the_configured_number_is_kept(tmp_path: Path) -> None:
    found = capacity(_config(tmp_path, [unused_port()]), UNLIMITED)
    assert found == Capacity(WANTED, WANTED, UNLIMITED, 128)
    assert not found.is_reduced


def test_each_replica_takes_a_file_for_its_checks(tmp_path: Path) -> None:
    few = capacity(_config(tmp_path, [unused_port()]), 1024)
    many = capacity(_config(tmp_path, [unused_port() for _ in range(101)]), 1024)
    assert many.max_connections < few.max_connections


def test_a_configuration_without_a_number_is_noticed(tmp_path: Path) -> None:
    config = _config(tmp_path, [unused_port()])
    with pytest.raises(Unexpected, match="maxconn"):
        capacity(config.replace(f"    maxconn {WANTED}\n", ""), 1024)


def test_the_limit_of_this_machine_is_read_from_the_process_itself() -> None:
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300)); from maas_ray.process.open_files import raise_limit; print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["300", "300"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] != 300
