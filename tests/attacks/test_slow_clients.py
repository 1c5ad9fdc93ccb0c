"""Clients that are slow, idle or do not read: each is closed in time, and no other client waits for them."""

import json
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from onnx import TensorProto, helper

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.store.objects import open_store
from tests.attacks.cases import INFER, LIVE, request
from tests.attacks.raw import Talk
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, linear, make_graph, value

TICK_S = 0.1
WIDE = 4_000_000
"""Values in one answer of the model `wide`: more than all buffers between server and client hold."""
HEAD = request(lines=[b"Content-Length: 500000"], length=False)
CHUNKED_HEAD = request(lines=[b"Transfer-Encoding: chunked"], length=False)
WIDE_ROW = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}).encode()


@dataclass
class Slow:
    """One client: bytes sent at the start, bytes sent at each tick, and whether it reads."""

    name: str
    start: bytes
    tick: bytes = b""
    reads: bool = True
    closed_after_s: float | None = None
    num_received: int = 0
    sock: socket.socket = field(init=False)

    def connect(self, port: int) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)

    def send(self, data: bytes) -> None:
        try:
            self.sock.send(data)
        except BlockingIOError:
            pass  # the server may stop reading
        except OSError:
            self.tick = b""

    def receive(self, now_s: float) -> None:
        try:
            while data := self.sock.recv(1 << 20):
                self.num_received += len(data)
        except BlockingIOError:
            return
        except OSError:  # reset: an end too
            pass
        self.closed_after_s = now_s


def trickle(port: int, clients: list[Slow], deadline_s: float, starts_reading_s: float) -> None:
    """Runs all clients concurrently until each is closed, or the deadline; a healthy one is served in between."""
    for client in clients:
        client.connect(port)
        client.send(client.start)
    started = time.monotonic()
    try:
        with Talk(port) as healthy:
            while any(client.closed_after_s is None for client in clients):
                now_s = time.monotonic() - started
                if now_s > deadline_s:
                    break
                for client in clients:
                    if client.closed_after_s is None:
                        if client.reads or now_s < starts_reading_s:
                            client.send(client.tick)
                        if client.reads or now_s > starts_reading_s:
                            client.receive(now_s)
                healthy.send([request(b"GET", LIVE)])
                assert (answer := healthy.read()) is not None
                assert answer.status == 200
                select.select([], [], [], TICK_S)
    finally:
        for client in clients:
            client.sock.close()


def clients() -> list[Slow]:
    body = request(body=WIDE_ROW, target=b"/v2/models/wide/infer")
    return [
        Slow("sends a head byte by byte", b"GET /v2 HTTP/1.1\r\nHost: a\r\nx: ", b"y"),
        Slow("sends header after header", b"GET /v2 HTTP/1.1\r\nHost: a\r\n", b"x: y\r\n"),
        Slow("sends empty lines", b"\r\n", b"\r\n"),
        Slow("stops in a head", b"GET /v2 HTTP/1.1\r\nHost: a\r\n"),
        Slow("sends a body byte by byte", HEAD, b"y"),
        Slow("stops before a body", HEAD),
        Slow("stops in a body", HEAD + b" " * 400_000),
        Slow("sends a body byte by byte, to a path that is not there", HEAD.replace(INFER, b"/nowhere"), b"y"),
        Slow("sends chunks of one byte", CHUNKED_HEAD, b"1\r\ny\r\n"),
        Slow("sends chunk extensions byte by byte", CHUNKED_HEAD + b"1;", b"y"),
        Slow("sends trailers byte by byte", CHUNKED_HEAD + b"0\r\nx: ", b"y"),
        Slow("stops in a chunk", CHUNKED_HEAD + b"ffff\r\n"),
        Slow(
            "waits for 100-continue and sends nothing", request(lines=[b"Expect: 100-continue", b"Content-Length: 9"])
        ),
        Slow("stops in the second of two requests", request(b"GET", LIVE) + request(b"GET", LIVE)[:30]),
        Slow("rests after an answer", request(b"GET", LIVE)),
        Slow("does not read a large answer", body, reads=False),
        Slow("does not read, and asks on", body, request(b"GET", LIVE) * 100, reads=False),
    ]


def wide() -> bytes:
    """y = x, WIDE times in a row."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, WIDE])
    model = make_graph(
        [helper.make_node("Constant", [], ["shape"], value=shape), helper.make_node("Expand", ["x", "shape"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 1])],
        [value("y", TensorProto.FLOAT, ["n", WIDE])],
    )
    return model.SerializeToString()


WIDE_SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, WIDE)),),
)


def serve(path: str, **limits: float) -> Iterator[Server]:
    store = open_store(f"file://{path}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "wide", commit_bundle(store, wide(), WIDE_SIGNATURE))
    spec = app_spec(store, "linear", "wide", limits=limits, batching={"max_batch_size": 1})
    yield from serve_app(store, spec, "protocol")


@pytest.mark.parametrize(
    ("limits", "closed_within_s"),
    [
        ({"io_timeout_s": 1.0, "idle_timeout_s": 1.5}, 4.0),
        pytest.param({"idle_timeout_s": 8.0}, 10.0, marks=pytest.mark.fault),
    ],
    ids=["short limits", "default limits"],
)
def test_slow_clients_are_closed_and_others_are_served(
    tmp_path_factory: pytest.TempPathFactory, limits: dict[str, float], closed_within_s: float
) -> None:
    for server in serve(str(tmp_path_factory.mktemp("slow")), **limits):
        slow = clients()
        # Four times the bound before the test fails: the exact time depends on the machine.
        trickle(server.port, slow, 4 * closed_within_s, starts_reading_s=closed_within_s)
        late = {client.name: client.closed_after_s for client in slow if client.closed_after_s is None}
        assert late == {}, "not closed at all"
        unread = [client for client in slow if not client.reads]
        assert all(client.num_received < 4 * WIDE for client in unread), "the whole answer was kept for it"


def test_the_watch_itself_sees_a_connection_that_stays_open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Control: with long limits no client is closed."""
    for server in serve(str(tmp_path_factory.mktemp("slow")), io_timeout_s=60.0, idle_timeout_s=60.0):
        slow = [client for client in clients() if client.name in ("stops in a head", "rests after an answer")]
        trickle(server.port, slow, 1.0, starts_reading_s=1.0)
        assert [client.closed_after_s for client in slow] == [None, None]
