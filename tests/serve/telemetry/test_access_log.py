"""Access log: real files, the real logger, its own thread."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maas_ray.errors import SpecError
from maas_ray.serve.telemetry.access_log import AccessLog, AccessLogSpec, access, open_access_log
from maas_ray.serve.telemetry.request_record import RequestRecord
from maas_ray.spec import parse_spec

OK = RequestRecord(
    "ok", 200, "id-1", 0.0125, "default", "m", 3, "run-a", 100, 200, 4, 0.0001, 0.002, 0.01, b"00-secret"
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.jsonl"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., AccessLog]]:
    made: list[AccessLog] = []

    def build(**more: Any) -> AccessLog:
        spec = AccessLogSpec.model_validate({"enabled": True, "path": str(path), "flush_every_s": 0.01, **more})
        log = open_access_log(spec, "r1")
        assert log is not None
        made.append(log)
        return log

    yield build
    for log in made:
        log.close(30)
    assert not [thread for thread in threading.enumerate() if thread.name == "access-log"]


def test_it_is_off_unless_it_is_asked_for() -> None:
    assert open_access_log(AccessLogSpec(), "r1") is None
    assert not [thread for thread in threading.enumerate() if thread.name == "access-log"]


def test_a_log_line_describes_the_request_and_nothing_more(make: Callable[..., AccessLog], path: Path) -> None:
    log = make()
    log.note(OK)
    log.close(30)
    (line,) = lines(path)
    at = line.pop("time")
    assert time.time() - 60 < time.mktime(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone < time.time() + 1
    assert len(at) == 24
    assert at.endswith("Z")
    assert line == {
        "request_id": "id-1",
        "tenant": "default",
        "model": "m",
        "version": 3,
        "outcome": "ok",
        "status": 200,
        "bytes_in": 100,
        "bytes_out": 200,
        "rows": 4,
        "queue_ms": 2.0,
        "compute_ms": 10.0,
        "total_ms": 12.5,
        "replica": "r1",
    }
    assert path.stat().st_mode & 0o007 == 0


def test_every_request_is_one_line_in_order(make: Callable[..., AccessLog], path: Path) -> None:
    log = make()
    for number in range(5000):
        log.note(OK._replace(request_id=str(number)))
        if number % 1000 == 0:
            until(lambda: path.exists() and path.read_bytes().count(b"\n") > number)  # called at once
    log.close(30)
    assert [line["request_id"] for line in lines(path)] == [str(number) for number in range(5000)]
    assert log.num_dropped == 0


def test_a_caller_cannot_write_lines_of_its_own(make: Callable[..., AccessLog], path: Path) -> None:
    log = make()
    odd = 'x"}\n{"status": 200, "é'
    log.note(OK._replace(request_id=odd, tenant=odd))
    log.close(30)
    (line,) = lines(path)
    assert line["request_id"] == line["tenant"] == odd


@pytest.mark.parametrize(("sample", "least", "most"), [(0.0, 0, 0), (0.25, 100, 500), (1.0, 1000, 1000)])
def test_a_share_is_written_but_every_error(
    make: Callable[..., AccessLog], path: Path, sample: float, least: int, most: int
) -> None:
    log = make(sample=sample)
    for number in range(1000):
        log.note(OK)
        if number % 100 == 0:
            log.note(OK._replace(outcome="cancelled", status=499))
            log.note(OK._replace(outcome="failed", status=500))
    log.close(30)
    written = [line["status"] for line in lines(path)]
    assert least <= written.count(200) <= most
    assert written.count(499) == written.count(500) == 10
    assert log.num_dropped == 0


class Stuck(logging.Handler):
    """A handler that hangs until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.freed = threading.Event(), threading.Event()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.entered.set()
        self.freed.wait(30)
        self.records.append(record.getMessage())


def test_a_writer_that_hangs_loses_lines_but_blocks_no_request(make: Callable[..., AccessLog]) -> None:
    handler = Stuck()
    access.addHandler(handler)
    try:
        log = make(path=None, max_buffered_lines=50)
        log.note(OK)
        assert handler.entered.wait(30)
        for _ in range(80):
            log.note(OK)
        assert log.num_dropped == 30
        log.close(0.05)
        log.note(OK)
        assert log.num_dropped == 31
        handler.freed.set()
        log.close(30)
        assert len(handler.records) == 51
        assert all(json.loads(record)["status"] == 200 for record in handler.records)
    finally:
        handler.freed.set()
        access.removeHandler(handler)


def test_a_file_that_was_moved_away_is_made_again(make: Callable[..., AccessLog], path: Path) -> None:
    log = make()
    log.note(OK._replace(request_id="before"))
    until(lambda: path.stat().st_size > 0)
    path.rename(path.with_suffix(".1"))
    log.note(OK._replace(request_id="after"))
    until(path.exists)
    log.close(30)
    assert [line["request_id"] for line in lines(path.with_suffix(".1"))] == ["before"]
    assert [line["request_id"] for line in lines(path)] == ["after"]


def test_a_directory_that_is_removed_and_restored_loses_the_lines_between(
    make: Callable[..., AccessLog], tmp_path: Path
) -> None:
    path = tmp_path / "logs" / "access.jsonl"
    path.parent.mkdir()
    log = make(path=str(path))
    path.unlink()
    path.parent.rmdir()
    log.note(OK)
    log.note(OK)
    until(lambda: log.num_dropped == 2)
    path.parent.mkdir()
    log.note(OK)
    log.close(30)
    assert len(lines(path)) == 1
    assert log.num_dropped == 2


def test_several_replicas_may_share_a_file(make: Callable[..., AccessLog], path: Path) -> None:
    logs = [make() for _ in range(4)]
    for number in range(500):
        for index, log in enumerate(logs):
            log.note(OK._replace(request_id=f"{index}-{number}"))
    for log in logs:
        log.close(30)
    assert len({line["request_id"] for line in lines(path)}) == 2000


def test_a_path_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absolute"):
        parse_spec(AccessLogSpec, {"enabled": True, "path": "access.jsonl"})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path / "nowhere" / "access.jsonl", tmp_path, pipe):
        with pytest.raises(SpecError, match="cannot be written"):
            open_access_log(AccessLogSpec(enabled=True, path=str(path)), "r1")
    assert not [thread for thread in threading.enumerate() if thread.name == "access-log"]
