"""Malformed HTTP got HAProxy's HTML instead of the documented JSON."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from maas_ray.haproxy.binary import find_binary, replace_pages, with_json_pages
from tests.support.front import Front, until


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    front = Front(Path(tmp_path_factory.mktemp("f")), num_replicas=1)
    try:
        front.manager().start()
        until(front.answers, "an answer")
        yield front
    finally:
        front.close()


MALFORMED = {
    "HTTP/0.9": b"GET /pool/x\r\n\r\n",
    "bytes": b"\x00\x01\x02\xff\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "long header": b"GET /pool/x HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 40_000 + b"\r\n\r\n",
    "long path": b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "many headers": b"GET /pool/x HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    "method": b"GE(T /pool/x HTTP/1.1\r\nHost: a\r\n\r\n",
    "blank in path": b"GET /pool/a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "byte in path": b"GET /pool/\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "blank before colon": b"GET /pool/x HTTP/1.1\r\nHost : a\r\n\r\n",
    "no colon": b"GET /pool/x HTTP/1.1\r\nHost: a\r\nabc\r\n\r\n",
    "two hosts": b"GET /pool/x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "length": b"POST /pool/x HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    "coding": b"POST /pool/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xx\r\n\r\n",
    "chunk": b"POST /pool/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "after a good one"])
def test_bytes_that_are_not_http_are_refused_in_json(front: Front, data: bytes, is_first: bool) -> None:
    with socket.create_connection(("127.0.0.1", front.port), timeout=5) as sock:
        if not is_first:
            sock.sendall(b"GET /-/routes HTTP/1.1\r\nHost: a\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 (400|408|422|501) ", head), answer
    assert b"content-type: application/json" in head.lower()
    assert int(re.search(rb"content-length: (\d+)", head.lower())[1]) == len(body)  # type: ignore[index]
    assert json.loads(body)["error"]


def test_a_head_that_never_ends_is_refused_in_json(front: Front) -> None:
    with socket.create_connection(("127.0.0.1", front.port), timeout=20) as sock:
        sock.sendall(b"GET /pool/x HT")
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "did not arrive" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_no_page_of_the_program_is_left_as_it_was(tmp_path: Path) -> None:
    original = Path(find_binary()).read_bytes()
    changed, number = replace_pages(original)
    assert (len(changed), number) == (len(original), 18)
    assert changed.count(b"<html><body>") == 1  # that of status 200
    assert replace_pages(changed)[1] == 0
    tmp_path.chmod(0o777)
    assert with_json_pages(find_binary(), tmp_path) == find_binary()  # other users could change the copy
