"""Attacks on memory: after many of them the server uses as much as before, and never more than a few bodies."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from maas_ray.serve.spec.limits import LimitsSpec
from maas_ray.store.objects import open_store
from tests.attacks.cases import BODY, DEPTH, bomb, chunked, gzip_bytes, request, tensor
from tests.attacks.raw import Talk
from tests.serve.conftest import publish
from tests.support.onnx_models import commit_bundle, linear

MIB = 1 << 20
MAX_BODY_BYTES = LimitsSpec().max_body_bytes
CHUNKS = b"1\r\n \r\n" * 10_000


def chunk_flood() -> Iterable[bytes]:
    """A body of a million chunks of one byte."""
    yield chunked(b"")
    for _ in range(100):
        yield CHUNKS
    yield b"0\r\n\r\n"


OTHERS = [
    [request(lines=[b"Content-Encoding: gzip"], body=bomb(gzip_bytes, 64 << 20))],
    [request(body=b"[" * DEPTH)],
    [request(body=b'{"inputs": [' + b",".join([b"{}"] * DEPTH) + b"]}")],
    [request(body=tensor(shape="[1000000000, 1000000000]"))],
    [request(lines=[b"Content-Length: 9999999999"], length=False), b" " * MIB],
    [request(lines=[b"a%d: b" % number for number in range(10_000)], body=BODY)],
]
HALF_A_BODY = request(lines=[b"Content-Length: %d" % MAX_BODY_BYTES], length=False) + b" " * MIB


class Process:
    """The server and its memory."""

    def __init__(self, pid: int, port: int) -> None:
        self._directory = Path(f"/proc/{pid}")
        self.port = port

    def _kib(self, name: str) -> int:
        lines = (self._directory / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    @property
    def rss(self) -> int:
        return self._kib("VmRSS") * 1024

    @property
    def peak(self) -> int:
        """The highest since `forget_peak`."""
        return self._kib("VmHWM") * 1024

    def forget_peak(self) -> None:
        (self._directory / "clear_refs").write_text("5")

    def ask(self, pieces: Iterable[bytes], wait_s: float = 30.0) -> int:
        """Returns the status; 0 if there is no response within `wait_s`, after which the client disconnects."""
        with Talk(self.port) as talk:
            talk.send(pieces)
            try:
                answer = talk.read(wait_s=wait_s)
            except TimeoutError:
                return 0
        return 0 if answer is None else answer.status

    def attack(self, num_floods: int, num_rounds: int) -> None:
        for _ in range(num_floods):
            assert self.ask(chunk_flood()) == 400
        for _ in range(num_rounds):
            assert [status for pieces in OTHERS if (status := self.ask(pieces)) >= 500] == []
            self.ask([HALF_A_BODY], wait_s=0.02)


@contextmanager
def process(store: str, front: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.attacks.served", store, front]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield Process(server.pid, int(server.stdout.readline()))
    finally:
        server.communicate(timeout=30)


@pytest.mark.parametrize(
    ("front", "num_floods", "num_rounds"),
    [
        ("protocol", 3, 5),
        pytest.param("protocol", 100, 1000, marks=[pytest.mark.fault, pytest.mark.timeout(1800)]),
        # 1,000 rounds more were measured to leave 2 MiB on uvicorn's own protocol, against none on ours.
        pytest.param("plain", 100, 0, marks=[pytest.mark.fault, pytest.mark.timeout(1800)]),
    ],
)
def test_attacks_leave_no_memory_behind(tmp_path: Path, front: str, num_floods: int, num_rounds: int) -> None:
    store = open_store(f"file://{tmp_path}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    with process(store.uri, front) as server:
        # The memory of the first floods is the allocator's working set and was measured to stay: on uvicorn's own
        # protocol 1.2 MiB after 20 floods, and 0.1 MiB more after 300 more; on ours 1.0 MiB after 600 rounds of the other
        # attacks, and 0.3 MiB more after 2,600 more.
        server.attack(max(2, num_floods // 5), max(12, num_rounds * 3 // 4))
        before = server.rss
        server.forget_peak()
        server.attack(num_floods, num_rounds)
        assert server.ask([request(body=BODY)]) == 200
        # The least of some readings: resident memory was seen to go up and down by 1 MiB over 225 floods, and to stay.
        readings = [server.rss]
        for _ in range(2):
            server.attack(1, 0)
            readings.append(server.rss)
        assert min(readings) - before < MIB
        assert server.peak - before < 3 * MAX_BODY_BYTES
