"""Slow clients of a pool of the portable profile, over TLS: a real cluster, Serve's own proxy, real sockets."""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from maas_ray.store.objects import open_store
from tests.serve.conftest import publish
from tests.support.onnx_models import commit_bundle
from tests.support.tls import make_certificate

IO_TIMEOUT_S = 2.0
"""Of the pool; a head, whose pool is not known yet, has the default of 8 s."""
PATIENCE_S = 25.0
BODY = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}'


@dataclass
class Portable:
    port: int
    context: ssl.SSLContext

    def connect(self) -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        return self.context.wrap_socket(sock, server_hostname="127.0.0.1")

    def infer(self) -> bytes:
        with self.connect() as sock:
            sock.sendall(head(len(BODY)) + BODY)
            return sock.recv(1 << 16)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portable]:
    home = Path(tmp_path_factory.mktemp("home"))
    store = open_store(f"file://{home}/store")
    publish(store, "linear", commit_bundle(store))
    made = make_certificate(home)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["MAAS_RAY_HOME"] = str(home / "state")

    def run(*arguments: str) -> Any:
        command = [sys.executable, "-m", "maas_ray.cli", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in arguments else None

    run("up", "--profile", "portable", "--num-cpus", "3", "--port", "0", "--dashboard-port", "0")
    try:
        port = json.loads((home / "state" / "cluster.json").read_text())["http_port"]
        spec = {
            "profile": "portable",
            "storage": {"uri": store.uri},
            "http": {"port": port, "tls": {"certificate": str(made.certificate), "key": str(made.key)}},
            "pools": [{"name": "a", "models": [{"name": "linear"}], "limits": {"io_timeout_s": IO_TIMEOUT_S}}],
        }
        (home / "spec.yaml").write_text(yaml.safe_dump(spec))
        run("serve", str(home / "spec.yaml"))
        found = Portable(port, ssl.create_default_context(cafile=str(made.certificate)))
        deadline = time.monotonic() + 60
        while not found.infer().startswith(b"HTTP/1.1 200 "):  # with TLS `serve` does not check the pool itself
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield found
    finally:
        run("down", "--drain-timeout-s", "0")


def head(size: int) -> bytes:
    return b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size


def rest(sock: socket.socket) -> bytes:
    """All data that the server sends until it closes the connection."""
    answer = b""
    with suppress(ConnectionError, ssl.SSLError):
        while piece := sock.recv(1 << 16):
            answer += piece
    return answer


@pytest.mark.fault
def test_each_kind_of_slow_caller_has_an_end_and_the_others_their_answers(portable: Portable) -> None:
    """All at a time: each has a bound of its own, and none is in the way of another."""
    address = ("127.0.0.1", portable.port)
    with (
        socket.create_connection(address, timeout=PATIENCE_S) as half_handshake,
        portable.connect() as silent,
        portable.connect() as half_head,
        portable.connect() as half_body,
        portable.connect() as second_head,
    ):
        half_handshake.sendall(b"\x16\x03\x01\x02\x00\x01")
        half_head.sendall(head(5)[:-2])
        half_body.sendall(head(1_000_000) + bytes(500_000))
        second_head.sendall(head(len(BODY)) + BODY + b"POST /v2/mod")

        assert portable.infer().startswith(b"HTTP/1.1 200 ")
        for sock, status, words in (
            (half_body, b"408", "of the body arrived in the last"),
            (half_head, b"408", "the head was not complete within 8 s"),
        ):
            start, _, body = rest(sock).partition(b"\r\n\r\n")
            assert start.startswith(b"HTTP/1.1 " + status)
            assert words in json.loads(body)["error"]
        answer = rest(second_head)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in answer
        assert rest(half_handshake) == rest(silent) == b""
        assert portable.infer().startswith(b"HTTP/1.1 200 ")


def test_a_body_whose_sender_leaves_reaches_no_replica(portable: Portable) -> None:
    with portable.connect() as sock:
        sock.sendall(head(len(BODY) + 1) + BODY)
    assert portable.infer().startswith(b"HTTP/1.1 200 ")
    with portable.connect() as sock:
        sock.sendall(b"GET /v2/models/linear/stats HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        _, _, body = rest(sock).partition(b"\r\n\r\n")
    (stats,) = json.loads(body)["model_stats"]
    assert stats["inference_stats"]["fail"]["count"] == 0
