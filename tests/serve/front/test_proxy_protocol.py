"""Protocol class of Serve's proxy in a real uvicorn, over sockets, plain and with TLS, in Ray's own event loop."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from maas_ray.serve.front.proxy_protocol import CONNECTION, Door, bound_handshakes, with_door
from maas_ray.serve.spec.limits import LimitsSpec
from tests.support.tls import make_certificate

LIMITS = LimitsSpec.model_validate({"io_timeout_s": 1.0, "min_bytes_per_s": 20_000})
SLOW_POOL = LIMITS.model_copy(update={"min_bytes_per_s": 100})
MAX_CONNECTIONS = 12
BIG = 64 << 20
PATIENCE_S = 15.0
"""Longest wait for what has a bound of a second; the machine may be busy."""


@dataclass
class Proxy:
    """A server in a thread of its own."""

    port: int
    context: ssl.SSLContext | None
    door: Door
    seen: list[tuple[str, int]] = field(default_factory=list)
    """Path and length of each body that was read whole."""

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        return self.context.wrap_socket(sock, server_hostname="127.0.0.1") if self.context else sock


class Application:
    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        connection = scope.pop(CONNECTION)
        path = scope["path"]
        if path == "/slow-pool":
            connection.limits = SLOW_POOL
        size = 0
        while path != "/early":
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message["more_body"]:
                self._proxy.seen.append((path, size))
                break
        if path == "/wait":
            await asyncio.sleep(3 * LIMITS.io_timeout_s)
        body = bytes(BIG) if path == "/big" else str(size).encode()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", str(len(body)).encode()), (b"x-trailer", dict(scope["headers"]).get(b"x-trailer", b""))],
            }
        )  # fmt: skip
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module", params=["plain", "tls"])
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    directory = Path(tmp_path_factory.mktemp("tls"))
    options: dict[str, Any] = {}
    context = None
    if request.param == "tls":
        made = make_certificate(directory)
        options = {"ssl_certfile": str(made.certificate), "ssl_keyfile": str(made.key)}
        context = ssl.create_default_context(cafile=str(made.certificate))
    listening = socket.create_server(("127.0.0.1", 0))
    found = Proxy(listening.getsockname()[1], context, Door(LIMITS, MAX_CONNECTIONS))
    config = uvicorn.Config(
        Application(found), http=with_door(found.door), lifespan="off", access_log=False, log_config=None,
        timeout_keep_alive=4, **options,
    )  # type: ignore[arg-type]  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    async def serve() -> None:
        bound_handshakes(asyncio.get_running_loop(), LIMITS.io_timeout_s)
        await server.serve(sockets=[listening])

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        listening.close()


def until_closed(sock: socket.socket) -> bytes:
    """Returns the rest of the server's data; fails if it does not close the connection in time."""
    answer = b""
    with suppress(ConnectionError, ssl.SSLError):
        while piece := sock.recv(1 << 16):
            answer += piece
    return answer


def answered(sock: socket.socket) -> bytes:
    """Reads one response of this application, which may arrive in several pieces."""
    answer = b""
    while True:
        piece = sock.recv(1 << 16)
        answer += piece
        head, found, body = answer.partition(b"\r\n\r\n")
        if not piece or (
            found and len(body) >= int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        ):
            return answer


def refusal(answer: bytes) -> str:
    """The text of a 408 in JSON."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 "), answer
    assert b"connection: close" in head
    return str(json.loads(body)["error"])


HEAD = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize("sent", [b"POST /x HT", b"POST /x HTTP/1.1\r\nHost: a\r\nX-Half: ", b"\r\n"], ids=["line", "header", "blank"])  # fmt: skip
def test_half_a_head_is_refused(proxy: Proxy, sent: bytes) -> None:
    with proxy.connect() as sock:
        sock.sendall(sent)
        assert "the head was not complete within 1 s" in refusal(until_closed(sock))


def test_half_a_head_after_an_answer_is_refused_too(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\nGET /y HT")
        answer = until_closed(sock)
        first, second = answer.split(b"\r\n\r\n0", 1)
        assert first.startswith(b"HTTP/1.1 200 ")
        assert "the head" in refusal(second)


def test_a_head_that_trickles_is_refused_although_bytes_keep_coming(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(b"POST /x HTTP/1.1\r\n")
        sock.settimeout(0.05)
        deadline, answer = time.monotonic() + PATIENCE_S, b""
        while not answer and time.monotonic() < deadline:
            with suppress(TimeoutError, ConnectionError, ssl.SSLError):
                sock.sendall(b"X")
                answer = sock.recv(1 << 16)
        assert "the head" in refusal(answer)


def test_half_a_body_is_refused(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(HEAD + bytes(500_000))
        assert "of the body arrived in the last" in refusal(until_closed(sock))


def test_a_body_that_trickles_is_refused_by_its_speed_and_not_by_its_length(proxy: Proxy) -> None:
    for path, size, is_refused in ((b"/x", 300, True), (b"/slow-pool", 300, False), (b"/x", 30_000, False)):
        with proxy.connect() as sock:
            sock.sendall(HEAD.replace(b"/x", path).replace(b"1000000", b"%d" % (25 * size)))
            with suppress(ConnectionError, ssl.SSLError):
                for _ in range(25):
                    sock.sendall(bytes(size))
                    time.sleep(0.1)
            answer = answered(sock)
            assert answer.startswith(b"HTTP/1.1 408 " if is_refused else b"HTTP/1.1 200 "), (path, size, answer)


def test_a_reader_that_stalls_is_closed(proxy: Proxy) -> None:
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(PATIENCE_S)
        raw.connect(("127.0.0.1", proxy.port))
        sock = proxy.context.wrap_socket(raw, server_hostname="127.0.0.1") if proxy.context else raw
        with sock:
            sock.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            sock.recv(1000)
            until_gone(proxy)
            assert len(until_closed(sock)) < BIG


def test_a_reader_that_continues_to_read_gets_everything(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        received, began = 0, time.monotonic()
        while piece := sock.recv(1 << 20):
            received += len(piece)
            if time.monotonic() - began < 3 * LIMITS.io_timeout_s:
                time.sleep(0.02)
        assert received > BIG


def test_connections_without_a_request_are_closed(proxy: Proxy) -> None:
    with proxy.connect() as silent, proxy.connect() as idle:
        idle.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answered(idle).startswith(b"HTTP/1.1 200 ")
        assert until_closed(silent) == b""
        time.sleep(LIMITS.io_timeout_s)
        idle.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")  # its time is the longer one of keep-alive
        assert answered(idle).startswith(b"HTTP/1.1 200 ")
        assert until_closed(idle) == b""


def test_an_answer_that_takes_long_is_waited_for_also_with_half_a_head_behind_it(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\nGET /y HT")
        assert answered(sock).startswith(b"HTTP/1.1 200 ")
        assert "the head" in refusal(until_closed(sock))


def test_a_body_that_is_no_longer_read_is_not_awaited(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(HEAD.replace(b"/x", b"/early") + b"12")
        answer = until_closed(sock)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1, "one answer to one request"


def test_a_handshake_that_stops_is_ended(proxy: Proxy) -> None:
    if proxy.context is None:
        pytest.skip("plain")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")  # the first bytes of a client's hello
        assert until_closed(sock) == b""


def test_a_connection_above_the_limit_gets_an_error(proxy: Proxy) -> None:
    until_gone(proxy)
    held = [proxy.connect() for _ in range(MAX_CONNECTIONS)]
    try:
        for sock in held:
            sock.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            assert answered(sock).startswith(b"HTTP/1.1 200 ")
        with proxy.connect() as sock:
            answer = until_closed(sock)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: " in answer
    finally:
        for sock in held:
            sock.close()
    until_gone(proxy)
    with proxy.connect() as sock:
        sock.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answered(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "sent",
    [b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", b"GET /x HTTP/1.1\r\n\r\n", b"hello\r\n\r\n"],
    ids=["long head", "no host", "not HTTP"],
)
def test_invalid_requests_are_answered_in_json(proxy: Proxy, sent: bytes) -> None:
    with proxy.connect() as sock:
        with suppress(ConnectionError, ssl.SSLError):
            sock.sendall(sent)
        head, _, body = until_closed(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert "error" in json.loads(body)


def test_a_trailer_is_not_a_header(proxy: Proxy) -> None:
    with proxy.connect() as sock:
        sock.sendall(
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Trailer: it\r\n\r\n"
        )
        answer = answered(sock)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"x-trailer: \r\n" in answer
        assert answer.endswith(b"\r\n\r\n3")


def until_gone(proxy: Proxy) -> None:
    """Waits until the server has forgotten every connection."""
    deadline = time.monotonic() + PATIENCE_S
    while proxy.door.connections:
        assert time.monotonic() < deadline, "connections were not closed"
        time.sleep(0.05)
