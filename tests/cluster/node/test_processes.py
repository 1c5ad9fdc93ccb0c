import os
import subprocess
import sys
import time

import pytest

from maas_ray.cluster.node.processes import MARKER, end_processes, find_processes
from maas_ray.ray_internals.processes import psutil

SLEEP = "import time; time.sleep(60)"
WITHOUT_ENVIRONMENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env={{}})"


def test_a_child_with_an_environment_of_its_own_belongs_to_the_cluster_and_ends_with_it() -> None:
    parent = _start("child", WITHOUT_ENVIRONMENT)
    _until(lambda: len(find_processes("child")) == 2)
    children = [process.pid for process in find_processes("child") if process.pid != parent.pid]
    assert end_processes("child", grace_s=0) == []
    parent.wait(10)
    assert not any(map(_is_alive, children))


def test_a_process_that_had_no_environment_at_one_look_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is just being replaced by another program has none: seen in 4 of 1,000 looks at one that always is."""
    started = _start("replaced", SLEEP)
    _until(lambda: len(find_processes("replaced")) == 1)
    environ, looks = psutil.Process.environ, []

    def replaced(process: psutil.Process) -> dict[str, str]:
        looks.append(process.pid)
        return {} if looks.count(process.pid) <= 2 and process.pid == started.pid else environ(process)

    monkeypatch.setattr(psutil.Process, "environ", replaced)
    assert end_processes("replaced", grace_s=0) == []
    started.wait(10)
    assert not _is_alive(started.pid)


def test_a_cluster_that_a_process_of_this_one_has_started_is_left_alone() -> None:
    inner = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}], env=os.environ | {{{MARKER!r}: 'inner'}})"
    outer = _start("outer", inner)
    _until(lambda: len(find_processes("inner")) == 1)
    try:
        assert end_processes("outer", grace_s=0) == []
        outer.wait(10)
        assert len(find_processes("inner")) == 1
    finally:
        end_processes("inner", grace_s=0)


def test_processes_of_another_cluster_and_of_nobody_are_left_alone() -> None:
    others = [_start("other", SLEEP), subprocess.Popen([sys.executable, "-c", SLEEP])]
    try:
        _until(lambda: len(find_processes("other")) == 1)
        assert end_processes("this", grace_s=0) == []
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in others:
            process.kill()
            process.wait()


def _start(cluster_id: str, script: str, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-I", "-S", "-c", script, *arguments]
    return subprocess.Popen(command, env={**os.environ, MARKER: cluster_id})


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(condition: object) -> None:
    end = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
