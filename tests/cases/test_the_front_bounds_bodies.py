"""For a pool scaled to zero, Serve's proxy read any body into memory, started a replica, and then refused it."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maas_ray.haproxy.config.limits import PoolLimits
from tests.support.front import Front, until

LIMITS = PoolLimits(timeout_s=5.0, drain_s=5.0, max_body_bytes=1000)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    front = Front(Path(tmp_path_factory.mktemp("f")), num_replicas=1, limits=LIMITS)
    try:
        front.manager().start()
        until(front.answers, "an answer")
        yield front
    finally:
        front.close()


def send(front: Front, data: bytes) -> bytes:
    answer = b""
    with socket.create_connection(("127.0.0.1", front.port), timeout=5) as sock:
        sock.sendall(data)
        while b"}" not in answer and (piece := sock.recv(4096)):
            answer += piece
    return answer


@pytest.mark.parametrize("length", [1001, 300 << 20, 1 << 62])
@pytest.mark.parametrize("sent", [0, 100, 20_000])
def test_a_body_that_is_too_large_is_refused_by_its_length_before_it_is_sent(
    front: Front, length: int, sent: int
) -> None:
    since = time.monotonic()
    head, _, text = send(
        front, b"POST /pool/x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length + b"1" * sent
    ).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"application/json" in head
    assert b"1000 bytes" in text
    assert time.monotonic() - since < 3


def test_a_body_of_the_limit_passes(front: Front) -> None:
    data = b"POST /pool/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"1" * 1000
    assert send(front, data).startswith(b"HTTP/1.1 200 ")
