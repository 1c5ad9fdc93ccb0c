import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maas_ray import confined
from maas_ray.confined import Limits
from maas_ray.confined.launch import SERVER
from maas_ray.errors import (
    ConfinedError,
    ConfinedKilled,
    ConfinedOutOfMemory,
    ConfinedTimeout,
    DataError,
    Overloaded,
)
from tests.support.root import ROOT

JOBS = "tests.support.confined_jobs"


def test_values_and_buffers_arrive_unchanged() -> None:
    blobs = [b"", b"abc", memoryview(bytes(3 << 20))]
    payload = {"text": "ä\n", "number": 1.5, "list": [1, None, True]}
    found, buffers = confined.call(f"{JOBS}:echo", payload, blobs)
    assert found == payload
    assert [bytes(buffer) for buffer in buffers] == [bytes(blob) for blob in blobs]


def test_an_error_of_ours_arrives_as_the_same_class_with_its_arguments() -> None:
    with pytest.raises(DataError, match="row 3 has no value"):
        confined.call(f"{JOBS}:fail", {"kind": "data"})
    with pytest.raises(Overloaded, match="full") as caught:
        confined.call(f"{JOBS}:fail", {"kind": "overloaded"})
    assert caught.value.retry_after_s == 2.5


def test_a_foreign_exception_is_a_death_that_names_it() -> None:
    with pytest.raises(ConfinedKilled, match="the file ended its process: KeyError"):
        confined.call(f"{JOBS}:fail", {"kind": "foreign"}, what="the file")


@pytest.mark.parametrize("function", ["nothing", "no_module.at_all:f"])
def test_a_missing_function_is_reported(function: str) -> None:
    with pytest.raises(ConfinedKilled, match="Error"):
        confined.call(function if ":" in function else f"{JOBS}:{function}", {})


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGFPE", "SIGABRT", "SIGKILL"])
def test_the_signal_that_killed_a_child_is_named(name: str) -> None:
    with pytest.raises(ConfinedKilled, match=f"the graph crashed its process with {name}") as caught:
        confined.call(f"{JOBS}:die", {"signal": name}, what="the graph")
    assert caught.value.signal == getattr(signal, name)


def test_a_native_crash_stays_in_the_child() -> None:
    with pytest.raises(ConfinedKilled, match="SIGSEGV"):
        confined.call(f"{JOBS}:crash", {})
    assert confined.call(f"{JOBS}:echo", {"still": "here"}).payload == {"still": "here"}


def test_a_child_that_takes_too_long_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(ConfinedTimeout, match=r"the limit of 0\.3 s"):
        confined.call(f"{JOBS}:sleep", {"seconds": 60}, limits=Limits(wall_s=0.3))
    assert time.monotonic() - started < 20


def test_a_child_that_uses_too_much_cpu_is_ended() -> None:
    with pytest.raises(ConfinedTimeout, match="the limit of 1 s of CPU"):
        confined.call(f"{JOBS}:spin", {}, limits=Limits(cpu_s=1))


def test_memory_beyond_the_limit_is_refused_and_memory_below_it_is_not() -> None:
    limits = Limits(memory_bytes=64 << 20)
    with pytest.raises(ConfinedOutOfMemory, match=f"more memory than its limit of {64 << 20} bytes"):
        confined.call(f"{JOBS}:eat", {"bytes": 128 << 20}, limits=limits)
    assert confined.call(f"{JOBS}:eat", {"bytes": 32 << 20}, limits=limits).payload == {"taken": 32 << 20}


def test_sent_data_does_not_count_toward_the_memory_limit() -> None:
    blob = bytes(128 << 20)
    limits = Limits(memory_bytes=192 << 20)
    assert len(confined.call(f"{JOBS}:echo", {}, [blob], limits).blobs[0]) == len(blob)


def test_a_child_writes_no_large_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ConfinedKilled, match="File too large"):
        confined.call(f"{JOBS}:write", {"path": str(path), "bytes": 1 << 20})
    assert path.stat().st_size <= 64 << 10


def test_an_answer_beyond_its_limit_is_not_read() -> None:
    with pytest.raises(ConfinedKilled, match="the limit is 1000"):
        confined.call(f"{JOBS}:answer", {"bytes": 2000}, limits=Limits(answer_bytes=1000))


def test_a_child_sees_no_secret_no_foreign_descriptor_and_no_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    SERVER.close()  # the next call starts one under these conditions
    secret = os.open(tmp_path, os.O_RDONLY)
    try:
        seen = confined.call(f"{JOBS}:look", {}).payload
    finally:
        os.close(secret)
        SERVER.close()
    assert "hidden" not in seen["environment"].values()
    assert str(tmp_path) not in seen["path"]
    assert "" not in seen["path"]
    assert len(seen["descriptors"]) <= 6  # its standard ones, the socket, the log, and that of the listing
    assert seen["core"] == [0, 0]


def test_a_call_is_aborted_from_another_thread() -> None:
    with confined.start(f"{JOBS}:sleep") as child:
        child.send({"seconds": 60})
        threading.Timer(0.2, child.abort).start()
        with pytest.raises(ConfinedKilled, match="SIGKILL"):
            child.result()
        assert not _is_alive(child.pid)


def test_an_abandoned_child_is_killed() -> None:
    with confined.start(f"{JOBS}:sleep") as child:
        child.send({"seconds": 60})
    _wait_until(lambda: not _is_alive(child.pid))


def test_a_service_sends_until_its_parent_has_received_enough() -> None:
    with confined.start(f"{JOBS}:count", is_service=True) as child:
        for number in range(5):
            child.socket.send(bytes([number]))
            assert child.socket.recv(1) == bytes([number + 1])
    _wait_until(lambda: not _is_alive(child.pid))


def test_children_run_side_by_side() -> None:
    children = [confined.start(f"{JOBS}:sleep") for _ in range(4)]
    try:
        started = time.monotonic()
        for child in children:
            child.send({"seconds": 1})
        for child in children:
            child.result()
        assert time.monotonic() - started < 3
    finally:
        for child in children:
            child.close()


def test_a_killed_server_is_started_again() -> None:
    confined.call(f"{JOBS}:echo", {})
    assert SERVER.pid is not None
    os.kill(SERVER.pid, signal.SIGKILL)
    _wait_until(lambda: SERVER.pid is None)
    assert confined.call(f"{JOBS}:echo", {"a": 1}).payload == {"a": 1}


def test_a_child_of_a_killed_server_ends_and_reports_it() -> None:
    with confined.start(f"{JOBS}:sleep") as child:
        child.send({"seconds": 60})
        assert SERVER.pid is not None
        os.kill(SERVER.pid, signal.SIGKILL)
        with pytest.raises(ConfinedError):
            child.result()


def test_children_die_with_a_parent_that_is_killed() -> None:
    script = (
        "from maas_ray import confined\n"
        f"child = confined.start('{JOBS}:sleep')\n"
        "child.send({'seconds': 60})\n"
        "print(child.pid, confined.launch.SERVER.pid, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(text) for text in parent.stdout.readline().split()]
        assert all(map(_is_alive, pids))
        parent.kill()
        parent.wait()
        _wait_until(lambda: not any(map(_is_alive, pids)))


def test_a_warm_child_answers_in_milliseconds() -> None:
    confined.call(f"{JOBS}:echo", {})
    started = time.monotonic()
    for _ in range(10):
        confined.call(f"{JOBS}:echo", {})
    assert (time.monotonic() - started) / 10 < 0.3


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(is_done: object) -> None:
    until = time.monotonic() + 20
    while not is_done():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_process_with_thousands_of_open_files_sees_the_end_of_a_child() -> None:
    """`select` takes no descriptor above 1,023, and a replica has one for each connection."""
    script = (
        "from maas_ray import confined\n"
        "from maas_ray.process.open_files import raise_limit\n"
        "assert raise_limit() > 2000\n"
        "files = [open('/dev/null') for _ in range(1500)]\n"
        f"child = confined.start('{JOBS}:sleep')\n"
        "print(child.has_ended())\n"
        "child.close()\n"
        "print(child.has_ended())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"], done.stderr
