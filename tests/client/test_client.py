"""`Client` and `AsyncClient` against real servers: requests, results, retries and errors."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
import pytest

from maas_ray.client import AsyncClient, Client, Prediction, Retries
from maas_ray.errors import BadRequest, ClusterError, DeadlineExceeded, MaasError, NotFound, Overloaded
from tests.serve.conftest import Server, shared_server  # noqa: F401 (a fixture)

Predict = Callable[..., Prediction]


@pytest.fixture(params=["sync", "async"])
def predict(request: pytest.FixtureRequest) -> Predict:
    """`predict(url, model, data, **options)` by one of the two clients."""

    def call(url: str, model: str, data: Any, **options: Any) -> Prediction:
        with Client(url, **options) as client:
            return client.predict(model, data)

    async def call_async(url: str, model: str, data: Any, **options: Any) -> Prediction:
        async with AsyncClient(url, **options) as client:
            return await client.predict(model, data)

    if request.param == "sync":
        return call
    return lambda url, model, data, **options: asyncio.run(call_async(url, model, data, **options))


ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    "data",
    [
        [{"x": row} for row in ROWS],
        {"x": np.array(ROWS, np.float32)},
        {"x": np.array(ROWS)},
        np.array(ROWS, np.float32),
        {"x": ROWS},
    ],
    ids=["rows", "arrays", "doubles", "one array", "lists"],
)
def test_rows_can_have_any_form(shared_server: Server, predict: Predict, data: Any) -> None:  # noqa: F811
    found = predict(shared_server.url, "linear", data)
    np.testing.assert_array_equal(found.outputs["y"], 2 * np.array(ROWS, np.float32))
    assert (found.model, found.version, found.run) == ("linear", "1", "run-a")
    assert found.request_id
    assert list(found.rows()) == [{"y": [2.0, 4.0, 6.0]}, {"y": [8.0, 10.0, 12.0]}]


def test_a_data_frame_has_a_column_per_input(shared_server: Server, predict: Predict) -> None:  # noqa: F811
    frame = pd.DataFrame({"color": ["green", "blue", ""], "age": [41.0, float("nan"), 7.0], "unused": [1, 2, 3]})
    found = predict(shared_server.url, "mixed", frame)
    assert [row["code"] for row in found.rows()] == [2, -1, 0]
    assert [row["shown"] for row in found.rows()] == [41.0, 30.0, 7.0]
    assert [row["echo"] for row in found.rows()] == ["green", "blue", ""]


def test_none_is_a_missing_value(shared_server: Server, predict: Predict) -> None:  # noqa: F811
    found = predict(shared_server.url, "mixed", [{"color": None, "age": None}])
    assert list(found.rows()) == [{"code": 0, "shown": 30.0, "echo": ""}]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("linear", [{"y": [1, 2, 3]}], "the rows lack x, required by the model; columns found: y"),
        ("linear", {"x": [[1, 2]]}, r"do not match FP32 \[rows, 3\]"),
        ("linear", {"x": [["a", "b", "c"]]}, "is not a number"),
        ("linear", [], "at least one"),
        ("linear", "x.csv", "cannot read rows from str"),
        ("linear", [1.0], "rows must be mappings"),
        ("mixed", np.zeros((1, 2)), "one array needs a model with one input; this model has 2: color, age"),
        ("mixed", {"color": ["red"], "age": [1.0, 2.0]}, "different numbers of rows: color 1, age 2"),
        ("mixed", [{"color": "red", "age": 1.0}, {"color": "red"}], "row 1 lacks age"),
    ],
)
def test_rows_that_do_not_match_are_refused_before_they_are_sent(
    shared_server: Server,  # noqa: F811
    predict: Predict,
    model: str,
    data: Any,
    message: str,
) -> None:
    with pytest.raises(BadRequest, match=message):
        predict(shared_server.url, model, data)


@pytest.mark.parametrize("value", [1.5, 1e300, float("nan"), -(2**40)])
def test_integers_are_never_rounded_or_wrapped(value: float) -> None:
    from maas_ray.client.messages import Tensor, write_request

    with pytest.raises(BadRequest, match="do not match INT32"):
        write_request((Tensor("n", "INT32", ()),), {"n": np.array([value])})


def test_an_unknown_model_is_not_found(shared_server: Server, predict: Predict) -> None:  # noqa: F811
    with pytest.raises(NotFound, match="answered 404"):
        predict(shared_server.url, "linaer", {"x": ROWS})


class Scripted(ThreadingHTTPServer):
    """A server with scripted answers: a status, `close` (no answer), `wait` (too late), or `other` (not v2)."""

    allow_reuse_address = True

    def __init__(self, *steps: int | str) -> None:
        self.steps = list(steps)
        self.seen: list[dict[str, str]] = []
        self.ports: set[int] = set()
        """Ports of the clients' ends of the connections."""
        self.until_over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a client that has disconnected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.endswith("/slow"):
            self.server.until_over.wait(30)
        self._reply(200, b'{"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}], "outputs": []}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.ports.add(self.client_address[1])
        self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        step = self.server.steps.pop(0) if self.server.steps else 200
        if step == "close":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif step == "wait":
            self.server.until_over.wait(30)
            self.close_connection = True
        elif step == "other":
            self._reply(200, b"<html>")
        elif step == 200:
            self._reply(200, b'{"model_name": "m", "outputs": [{"name": "y", "datatype": "INT64", "shape": [1], "data": [7]}]}')  # fmt: skip
        else:
            self._reply(int(step), b'{"error": "no room"}', {"Retry-After": "0"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*steps: int | str) -> Scripted:
        server = Scripted(*steps)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.until_over.set()
        server.shutdown()
        server.server_close()


def url_of(server: Scripted) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_an_overloaded_request_is_retried_after_the_servers_pause(
    scripted: Callable[..., Scripted], predict: Predict
) -> None:
    server = scripted(503, "close", 503)
    found = predict(url_of(server), "m", {"x": [1.0]}, headers={"x-team": "a"})
    assert found.outputs["y"].tolist() == [7]
    assert len({seen["x-request-id"] for seen in server.seen}) == 1, "all attempts have one id in the logs"
    left_ms = [int(seen["x-request-timeout-ms"]) for seen in server.seen]
    assert left_ms == sorted(left_ms, reverse=True)
    assert {seen["x-team"] for seen in server.seen} == {"a"}


@pytest.mark.parametrize(
    ("steps", "expected", "num_sent"),
    [
        ((503,) * 9, Overloaded, 4),
        ((400,), BadRequest, 1),
        ((504,), DeadlineExceeded, 1),
        ((500,), MaasError, 1),
        (("close",) * 9, ClusterError, 4),
        (("other",), ClusterError, 1),
    ],
    ids=str,
)
def test_other_answers_raise_their_error(
    scripted: Callable[..., Scripted],
    predict: Predict,
    steps: tuple[Any, ...],
    expected: type[MaasError],
    num_sent: int,
) -> None:
    server = scripted(*steps)
    with pytest.raises(expected):
        predict(url_of(server), "m", {"x": [1.0]})
    assert len(server.seen) == num_sent


def test_a_call_ends_at_its_deadline(scripted: Callable[..., Scripted], predict: Predict) -> None:
    with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        predict(url_of(scripted("wait")), "m", {"x": [1.0]}, timeout_s=0.5)


def test_the_timeout_of_a_call_includes_the_request_for_the_metadata(scripted: Callable[..., Scripted]) -> None:
    url = url_of(scripted())

    async def predict_async() -> None:
        async with AsyncClient(url) as client:
            await client.predict("slow", {"x": [1.0]}, timeout_s=0.5)

    with Client(url) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        client.predict("slow", {"x": [1.0]}, timeout_s=0.5)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        asyncio.run(predict_async())


def test_a_missing_server_is_reported(predict: Predict) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ClusterError, match=f"nothing answers at http://127.0.0.1:{port}"):
        predict(f"http://127.0.0.1:{port}", "m", {"x": [1.0]}, retries=Retries(max_attempts=2))


def test_one_client_keeps_its_connection(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    with Client(url_of(server)) as client:
        for _ in range(5):
            client.predict("m", {"x": [1.0]})
    assert len(server.ports) == 1
