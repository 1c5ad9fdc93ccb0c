"""The generate extension, CORS and strict readiness, which users migrating from Triton need, were missing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from onnx import TensorProto, helper

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import SpecError
from maas_ray.registry.models import Registry
from maas_ray.serve.spec.limits import LimitsSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore, open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import LINEAR, commit_bundle, linear, lookup, make_graph, value

ORIGIN = "https://shop.example"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type, x-mine",
}


def text_model() -> tuple[bytes, Signature]:
    """text_output = text_input; doubled = 2 * number, a row of any length."""
    nodes = [
        helper.make_node("Identity", ["text_input"], ["text_output"]),
        helper.make_node("Add", ["number", "number"], ["doubled"]),
    ]
    graph = make_graph(
        nodes,
        [value("text_input", TensorProto.STRING, ["n", 1]), value("number", TensorProto.INT64, ["n", "m"])],
        [value("text_output", TensorProto.STRING, ["n", 1]), value("doubled", TensorProto.INT64, ["n", "m"])],
    )

    def tensor(name: str, datatype: Any, width: int) -> TensorSpec:
        return TensorSpec(name=name, datatype=datatype, shape=(-1, width))

    signature = Signature(
        inputs=(tensor("text_input", "BYTES", 1), tensor("number", "INT64", -1)),
        outputs=(tensor("text_output", "BYTES", 1), tensor("doubled", "INT64", -1)),
    )
    return graph.SerializeToString(), signature


@pytest.fixture(scope="module", params=["protocol", "plain"])
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('generate')}/store")
    publish(store, "text", commit_bundle(store, *text_model()))
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    spec = app_spec(store, "text", "linear", limits={"cors_origins": [ORIGIN]})
    yield from serve_app(store, spec, request.param)


def test_generate_accepts_and_returns_a_flat_object(server: Server) -> None:
    question = {"text_input": "hé", "number": [1, 2, 3], "stream": False, "parameters": {"temperature": 0.5}}
    answer = requests.post(f"{server.url}/v2/models/text/generate", json=question, timeout=20)
    assert answer.json() == {"model_name": "text", "model_version": "1", "text_output": "hé", "doubled": [2, 4, 6]}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-maas-run"]
    question = {"text_input": ["a"], "number": 4, "id": "7"}
    answer = requests.post(f"{server.url}/v2/models/text/versions/1/generate", json=question, timeout=20)
    assert answer.json()["doubled"] == 8
    assert answer.json()["id"] == "7"


def test_generate_stream_is_one_event(server: Server) -> None:
    question = {"text_input": "a", "number": 1}
    answer = requests.post(f"{server.url}/v2/models/text/generate_stream", json=question, timeout=20)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text == 'data: {"model_name":"text","model_version":"1","text_output":"a","doubled":2}\n\n'


def test_a_model_without_text_can_be_asked_so_too(server: Server) -> None:
    answer = requests.post(f"{server.url}/v2/models/linear/generate", json={"x": [1, 2, 3]}, timeout=20)
    assert answer.json()["y"] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("model", "question", "message"),
    [
        ("text", {"number": 1}, "missing input 'text_input'"),
        ("text", {"text_input": ["a", "b"], "number": 1}, "2 elements"),
        ("text", {"text_input": 5, "number": 1}, "not a string"),
        ("text", {"text_input": "a", "number": {"a": 1}}, "is INT64"),
        ("text", {"text_input": "a", "number": 1, "more": {}}, "not a string, number or boolean"),
        ("text", {"text_input": "a", "number": 1, "parameters": []}, "not an object"),
        ("text", {"text_input": "a", "number": 1, "sequence_id": 4}, "not supported"),
        ("linear", {"x": [1, 2]}, "needs 3"),
        ("text", [], "not a JSON object"),
    ],
)
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_what_does_not_fit_is_refused_as_elsewhere(
    server: Server, model: str, question: Any, message: str, path: str
) -> None:
    answer = requests.post(f"{server.url}/v2/models/{model}/{path}", json=question, timeout=20)
    assert answer.status_code in (400, 501)
    assert message in answer.json()["error"]


@pytest.mark.parametrize("path", ["v2/models/linear/infer", "v2/health/ready", "v2/models/none"])
def test_a_page_of_a_listed_origin_may_read_every_reply(server: Server, path: str) -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
    method = "POST" if path.endswith("infer") else "GET"
    for _ in range(3):
        answer = requests.request(method, f"{server.url}/{path}", json=body, headers={"origin": ORIGIN}, timeout=20)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "origin"
        other = requests.request(method, f"{server.url}/{path}", json=body, headers={"origin": "https://x"}, timeout=20)
        assert other.status_code == answer.status_code
        assert "access-control-allow-origin" not in other.headers
        plain = requests.request(method, f"{server.url}/{path}", json=body, timeout=20)
        assert "access-control-allow-origin" not in plain.headers


def test_a_preflight_is_answered_for_listed_origins_only(server: Server) -> None:
    url = f"{server.url}/v2/models/linear/infer"
    answer = requests.options(url, headers=PREFLIGHT, timeout=20)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "content-type, x-mine"
    assert (
        requests.options(url, headers={**PREFLIGHT, "origin": "https://other.example"}, timeout=20).status_code == 405
    )
    assert requests.options(url, timeout=20).status_code == 405
    odd = requests.options(url, headers={**PREFLIGHT, "access-control-request-headers": "a;b"}, timeout=20)
    assert "access-control-allow-headers" not in odd.headers


def test_origins_are_off_by_default_and_checked() -> None:
    assert LimitsSpec().cors_origins == ()
    assert parse_spec(LimitsSpec, {"cors_origins": ["*", "http://localhost:3000", "https://[::1]:8"]}).cors_origins
    for wrong in ("shop.example", "https://shop.example/", "https://Shop.example", "https://a b", ""):
        with pytest.raises(SpecError, match="is not an origin"):
            parse_spec(LimitsSpec, {"cors_origins": [wrong]})


@pytest.mark.parametrize("is_strict", [True, False])
def test_strict_readiness_is_that_of_every_listed_model(file_store: ObstoreStore, is_strict: bool) -> None:
    for name in ("a", "b"):
        publish(file_store, name, commit_bundle(file_store, linear(2.0)))
    spec = app_spec(file_store, "a", "b", strict_readiness=is_strict)
    for server in serve_app(file_store, spec, "protocol"):
        assert requests.get(f"{server.url}/v2/health/ready", timeout=20).status_code == 200
        # Its signature is not that of its graph, so it can never load.
        broken = Registry(file_store).publish("b", commit_bundle(file_store, lookup(), LINEAR))
        Registry(file_store).promote("b", broken.version)
        server.call(server.manager.refresh())
        ready = requests.get(f"{server.url}/v2/health/ready", timeout=20)
        assert ready.status_code == (503 if is_strict else 200)
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
        assert requests.post(f"{server.url}/v2/models/a/infer", json=body, timeout=20).status_code == 200
        Registry(file_store).promote("b", 1)
        server.call(server.manager.refresh())
        assert requests.get(f"{server.url}/v2/health/ready", timeout=20).status_code == 200


def test_rows_of_generate_and_infer_may_share_a_run(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> bool:
        row = [float(number)] * 3
        if number % 2:
            answer = requests.post(f"{server.url}/v2/models/linear/generate", json={"x": row}, timeout=20).json()["y"]
        else:
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": row}
            answer = requests.post(f"{server.url}/v2/models/linear/infer", json={"inputs": [tensor]}, timeout=20)
            answer = answer.json()["outputs"][0]["data"]
        return bool(np.array_equal(answer, [2.0 * number] * 3))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(64)))
