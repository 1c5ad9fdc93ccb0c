"""HTTP routes over a real socket, called by third-party clients and with handwritten bytes."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from maas_ray.errors import MaasError
from maas_ray.serve.request.head import LAYERS
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import resident

ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


def infer(server: Server, body: Any = ROW, model: str = "linear", **more: Any) -> requests.Response:
    return requests.post(f"{server.url}/v2/models/{model}/infer", json=body, timeout=30, **more)


def test_the_layers_are_in_the_documented_order() -> None:
    names = [layer.__name__ for layer in LAYERS]  # type: ignore[attr-defined]
    assert names == ["request_id", "cross_origin", "route", "single_headers", "deadline", "body_limit", "body_form"]


def test_an_answer_carries_values_id_run_version_and_request_id(shared_server: Server) -> None:
    answer = infer(shared_server, {"id": "7", **ROW}, headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    assert answer.json() == {
        "model_name": "linear",
        "model_version": "1",
        "id": "7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [2.0, 4.0, 6.0]}],
    }
    assert answer.headers["x-maas-run"] == "run-a"
    assert answer.headers["x-maas-version"] == "1"
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("given", ["", "x" * 200, "with space"])
def test_a_request_id_that_cannot_be_used_is_replaced(shared_server: Server, given: str) -> None:
    returned = infer(shared_server, headers={"x-request-id": given}).headers["x-request-id"]
    assert len(returned) == 32


def test_nested_data_and_missing_values_reach_the_model(shared_server: Server) -> None:
    body = {
        "inputs": [
            {"name": "color", "shape": [2, 1], "datatype": "BYTES", "data": [["green"], [None]]},
            {"name": "age", "shape": [2, 1], "datatype": "FP32", "data": [[None], [5]]},
        ],
        "outputs": [{"name": "shown"}, {"name": "code"}],
    }
    outputs = infer(shared_server, body, "mixed").json()["outputs"]
    assert [(output["name"], output["data"]) for output in outputs] == [("shown", [30.0, 5.0]), ("code", [2, 0])]


GETS = [
    ("/v2", {"name": "maas-ray"}),
    ("/v2/health/live", {"live": True}),
    ("/v2/health/ready", {"ready": True}),
    ("/v2/models", {"models": ["linear", "mixed", "lookup"]}),
    ("/v2/models/linear", {"name": "linear", "versions": ["1"], "platform": "onnxruntime_onnx"}),
    ("/v2/models/linear/versions/1", {"name": "linear", "versions": ["1"]}),
    ("/v2/models/linear/versions", {"versions": ["1"]}),
    ("/v2/models/linear/ready", {"name": "linear", "ready": True}),
    ("/v2/models/linear/versions/1/ready", {"name": "linear", "ready": True}),
]


@pytest.mark.parametrize(("path", "expected"), GETS)
def test_every_get_answers_and_its_head_has_the_same_headers_without_a_body(
    shared_server: Server, path: str, expected: dict[str, Any]
) -> None:
    answer = requests.get(shared_server.url + path, timeout=30)
    assert answer.status_code == 200
    assert expected.items() <= answer.json().items()
    head = requests.head(shared_server.url + path, timeout=30)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "no path '/'"),
        ("GET", "/v1/models/linear", 404, "no path"),
        (
            "GET",
            "/v2/models/none",
            404,
            "Request for unknown model: 'none' is not found; this pool serves: linear, mixed, lookup",
        ),
        ("POST", "/v2/models/none/infer", 404, "unknown model: 'none'"),
        (
            "GET",
            "/v2/models/linear/versions/9",
            404,
            "unknown model: 'linear' version 9 is not found; this pool serves: 1",
        ),
        ("POST", "/v2/models/linear/versions/9/infer", 404, "version 9 is not found"),
        ("GET", "/v2/models/linear/versions/x", 400, "version 'x' is not a positive integer"),
        ("GET", "/v2/models/linear/versions/0", 400, "not a positive integer"),
        ("GET", "/v2/models/linear/versions/" + "9" * 30, 400, "not a positive integer"),
        ("GET", "/v2/models//infer", 404, "no path"),
        ("GET", "/v2/models/linear/nothing", 404, "no path"),
        ("GET", "/v2/repository/index", 405, "use POST"),
        ("POST", "/v2/repository/models/linear/load", 400, "model_control"),
        ("GET", "/v2/models/linear/infer", 405, "'GET' is not allowed here; use POST"),
        ("DELETE", "/v2/models/linear/infer", 405, "use POST"),
        ("POST", "/v2/models/linear", 405, "use GET"),
        ("POST", "/v2/health/live", 405, "use GET"),
    ],
)
def test_missing_resources_get_errors_in_the_protocols_form(
    shared_server: Server, method: str, path: str, status: int, message: str
) -> None:
    answer = requests.request(method, shared_server.url + path, timeout=30)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert message in answer.json()["error"]
    assert answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"] == ("POST" if message.endswith("use POST") else "GET, HEAD")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[NaN,2,3]}]}', "send null"),
        (b'{"inputs":[{"name":"x","shape":[-1,3],"datatype":"FP32","data":[]}]}', "non-negative"),
        (b'{"inputs":[{"name":"x","shape":[1000000000000,3],"datatype":"FP32","data":[1]}]}', "data has 1 elements"),
        (
            b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"INT64","data":[1,2,3]}]}',
            "'INT64' is not the model's FP32",
        ),
        (b"[" * 90_000, "not JSON"),
    ],
)
def test_a_bad_body_is_a_400_that_still_names_the_version(shared_server: Server, body: bytes, message: str) -> None:
    answer = requests.post(f"{shared_server.url}/v2/models/linear/infer", data=body, timeout=30)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert answer.headers["x-maas-version"] == "1"


def test_a_value_that_the_graph_refuses_is_a_400_without_internals(shared_server: Server) -> None:
    body = {"inputs": [{"name": "index", "shape": [1, 1], "datatype": "INT64", "data": [99]}]}
    answer = infer(shared_server, body, "lookup")
    assert answer.status_code == 400
    assert "rejects these values" in answer.json()["error"]
    assert "Gather" not in answer.text


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"content-encoding": "br"}, "content-encoding b'br' is not supported"),
        ({"content-encoding": "gzip"}, "gzip"),
        ({"inference-header-content-length": "ten"}, "is not a non-negative integer"),
        ({"inference-header-content-length": "100000"}, "100000"),
        ({"x-request-timeout-ms": "soon"}, "not a positive integer"),
        ({"x-request-timeout-ms": "-5"}, "not a positive integer"),
        ({"x-request-timeout-ms": "0"}, "not a positive integer"),
    ],
)
def test_unsupported_headers_are_refused(shared_server: Server, headers: dict[str, str], message: str) -> None:
    answer = infer(shared_server, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_a_body_over_the_limit_is_refused_by_its_declared_length(shared_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared_server.port), timeout=10) as sock:
        sock.sendall(b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413"), "answered without a byte of the body"


def test_a_body_over_the_limit_is_refused_while_it_streams(shared_server: Server) -> None:
    answer = requests.post(
        f"{shared_server.url}/v2/models/linear/infer", data=(b"x" * 10_000 for _ in range(11)), timeout=30
    )
    assert answer.status_code == 413
    assert "the limit is 100000" in answer.json()["error"]


def test_a_body_that_trickles_in_ends_at_the_deadline(shared_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared_server.port), timeout=10) as sock:
        head = b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\nx-request-timeout-ms: 200\r\n\r\n"
        sock.sendall(head + b'{"inp')
        answer = b""
        while not answer.endswith(b"}"):
            chunk = sock.recv(65536)
            assert chunk, "closed before the answer was complete"
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 504")
    assert b"only 5 bytes of the body arrived" in answer


def test_an_unexpected_failure_is_a_500_without_its_text(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("a secret of the inside")

    server.manager.versions = explode  # type: ignore[method-assign,assignment]
    answer = requests.get(f"{server.url}/v2/models/linear", headers={"x-request-id": "find-me"}, timeout=30)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "find-me" in answer.json()["error"]
    assert "find-me" in caplog.text


class Hold:
    """Keeps the engine busy until `free`, by taking the place of the batcher's runner."""

    def __init__(self, server: Server) -> None:
        self._server = server
        model = resident(server.manager, "linear")
        self._batcher, self._runner = model.batcher, model.runner
        self._kept = model.runner.start, model.runner.estimate_s
        self._held: list[Any] = []
        self._runner.start = lambda *run: self._held.append(run)  # type: ignore[method-assign]
        self._runner.estimate_s = lambda num_rows, form=(): 0.001

    def wait_queued(self, num_requests: int) -> None:
        deadline = time.monotonic() + 20
        while self._server.call_plain(lambda: self._batcher.num_queued) != num_requests:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_busy(self) -> None:
        deadline = time.monotonic() + 20
        while not self._held:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def free(self) -> None:
        self._runner.start, self._runner.estimate_s = self._kept  # type: ignore[method-assign]
        self._server.call_plain(lambda: self._runner.start(*self._held.pop()))


@pytest.fixture
def narrow(file_store: ObstoreStore) -> Iterator[Server]:
    """Serves `linear` with room for two waiting requests."""
    publish(file_store, "linear", commit_bundle(file_store, linear(2.0)))
    yield from serve_app(file_store, app_spec(file_store, "linear", batching={"max_queued_requests": 2}), "protocol")


def test_a_full_queue_is_a_503_with_retry_after_at_once(narrow: Server) -> None:
    server, hold = narrow, Hold(narrow)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(infer, server)
        hold.wait_busy()
        waiting = [pool.submit(infer, server) for _ in range(2)]
        hold.wait_queued(2)
        refused = infer(server)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "2 requests wait, the limit is 2" in refused.json()["error"]
        hold.free()
        assert [future.result(30).status_code for future in (running, *waiting)] == [200, 200, 200]


def test_a_deadline_is_a_504_and_the_work_is_not_run(server: Server) -> None:
    hold = Hold(server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(infer, server)
        hold.wait_busy()
        late = infer(server, headers={"x-request-timeout-ms": "50"})
        assert late.status_code == 504
        assert "deadline" in late.json()["error"]
        hold.wait_queued(0)
        hold.free()
        assert running.result(30).status_code == 200


def test_a_client_that_leaves_frees_its_place_in_the_queue(server: Server) -> None:
    hold = Hold(server)
    body = json.dumps(ROW).encode()
    head = b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(infer, server)
        hold.wait_busy()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(head + body)
            hold.wait_queued(1)
        hold.wait_queued(0)
        hold.free()
        assert running.result(30).status_code == 200


def test_tritonclient_works_with_its_defaults(shared_server: Server) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{shared_server.port}")
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("linear")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.get_model_metadata("mixed")["inputs"][0]["datatype"] == "BYTES"
        assert client.get_model_config("linear")["input"][0]["data_type"] == "TYPE_FP32"
        rows = np.arange(6, dtype=np.float32).reshape(2, 3)
        x = triton.InferInput("x", rows.shape, "FP32")
        x.set_data_from_numpy(rows)
        np.testing.assert_array_equal(client.infer("linear", [x]).as_numpy("y"), rows * 2)
        packed = client.infer(
            "linear", [x], request_compression_algorithm="gzip", response_compression_algorithm="deflate"
        )
        np.testing.assert_array_equal(packed.as_numpy("y"), rows * 2)
        best = [triton.InferRequestedOutput("y", class_count=1)]
        assert client.infer("linear", [x], outputs=best).as_numpy("y").tolist() == [[b"4.000000:2"], [b"10.000000:2"]]
        x.set_data_from_numpy(rows, binary_data=False)
        wanted = [triton.InferRequestedOutput("y", binary_data=False)]
        result = client.infer("linear", [x], outputs=wanted, request_id="9", model_version="1")
        np.testing.assert_array_equal(result.as_numpy("y"), rows * 2)
        assert result.get_response()["id"] == "9"
        waiting = [client.async_infer("linear", [x]) for _ in range(5)]
        for answer in waiting:
            np.testing.assert_array_equal(answer.get_result().as_numpy("y"), rows * 2)
        with pytest.raises(InferenceServerException, match="unknown model: 'nobody'"):
            client.infer("nobody", [x])
    finally:
        client.close()


def test_the_aio_client_works_too(shared_server: Server) -> None:
    async def ask() -> list[np.ndarray]:
        rows = np.arange(6, dtype=np.float32).reshape(2, 3)
        x = triton.InferInput("x", rows.shape, "FP32")
        x.set_data_from_numpy(rows)
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{shared_server.port}") as client:
            answers = await asyncio.gather(*(client.infer("linear", [x]) for _ in range(8)))
        return [answer.as_numpy("y") for answer in answers]

    for array in asyncio.run(ask()):
        np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3) * 2)


def test_statistics_and_metrics_count_the_requests(server: Server) -> None:
    rows = {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}]}
    for _ in range(3):
        assert infer(server, rows).status_code == 200
    assert infer(server, {}).status_code == 400
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    try:
        (counted,) = client.get_inference_statistics("linear")["model_stats"]
    finally:
        client.close()
    assert (counted["inference_count"], counted["execution_count"]) == (6, 3)
    assert counted["inference_stats"]["success"]["count"] == 3
    assert counted["inference_stats"]["fail"]["count"] == 1
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    samples = {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["maas_requests_total", "ok"] == 3
    assert samples["maas_requests_total", "bad_request"] == 1


def test_the_repository_lists_its_models(shared_server: Server) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{shared_server.port}")
    try:
        index = client.get_model_repository_index()
        assert {(entry["name"], entry["version"], entry["state"]) for entry in index} == {
            (name, "1", "READY") for name in ("linear", "lookup", "mixed")
        }
        with pytest.raises(InferenceServerException, match="model_control"):
            client.unload_model("linear")
    finally:
        client.close()


def test_answers_under_load_are_each_callers_own(shared_server: Server) -> None:
    """Eight concurrent clients, each with its own rows, some of them poison."""

    def call(caller: int) -> int:
        with requests.Session() as session:
            for turn in range(25):
                number = caller * 1000 + turn
                if turn % 5 == 4:
                    body = {"inputs": [{"name": "index", "shape": [1, 1], "datatype": "INT64", "data": [number + 9]}]}
                    answer = session.post(f"{shared_server.url}/v2/models/lookup/infer", json=body, timeout=30)
                    assert answer.status_code == 400
                    continue
                data = [number + k for k in range(3 * (1 + turn % 3))]
                shape = [len(data) // 3, 3]
                body = {"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "data": data}]}
                answer = session.post(f"{shared_server.url}/v2/models/linear/infer", json=body, timeout=30)
                assert answer.status_code == 200, answer.text
                assert answer.json()["outputs"][0]["data"] == [2.0 * value for value in data]
        return caller

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == list(range(8))


def test_stopping_gives_everything_back(server: Server) -> None:
    server.call(server.manager.close())
    assert infer(server).status_code == 503, "which another replica answers"
    assert requests.get(f"{server.url}/v2/health/ready", timeout=30).status_code == 503
    with pytest.raises(MaasError):
        resident(server.manager, "linear")
