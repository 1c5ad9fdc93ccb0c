"""Responses had no limit: a classification turned 172 bytes into 33.8 MB, Expand 154 bytes into 120 MB, on the
loop.

Required: `limits.max_answer_bytes` is checked before a response is written, rows times classes are limited, and long
writes are done in a thread, in pieces.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
import requests

from maas_ray.errors import AnswerTooLarge, RunStopped
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.inference.codec import MessageCodec
from maas_ray.serve.grpc.inference.message import join
from maas_ray.serve.grpc.status import status_of
from maas_ray.serve.wire import answer
from maas_ray.serve.wire.answer import AnswerWriter
from maas_ray.serve.wire.checks import InferRequest, WantedOutput
from maas_ray.serve.wire.classification import classify
from maas_ray.serve.wire.tensors import write_json
from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.heavy_models import EXPANDING, expanding, wide, wide_signature
from tests.support.onnx_models import commit_bundle, linear, make_info

LIMIT = 4 << 20
ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('a7')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "wide", commit_bundle(store, wide(), wide_signature()))
    publish(store, "expanding", commit_bundle(store, expanding(), EXPANDING))
    spec = app_spec(store, "linear", "wide", "expanding", limits={"max_answer_bytes": LIMIT, "timeout_s": 20})
    yield from serve_app(store, spec, "protocol")


def ask(server: Server, model: str, body: dict[str, Any], **more: Any) -> requests.Response:
    return requests.post(f"{server.url}/v2/models/{model}/infer", json=body, timeout=30, **more)


def zeros(rows: int, columns: int, **output: Any) -> dict[str, Any]:
    body = {"inputs": [{"name": "shape", "shape": [2], "datatype": "INT64", "data": [rows, columns]}]}
    return {**body, "outputs": [{"name": "y", "parameters": output}]} if output else body


def test_an_answer_over_the_limit_is_refused_with_the_way_out(server: Server) -> None:
    answer = ask(server, "expanding", zeros(2000, 2000))
    assert answer.status_code == 422
    assert "limits.max_answer_bytes" in answer.json()["error"]
    assert "binary data" in answer.json()["error"]
    assert ask(server, "expanding", zeros(2000, 2000, binary_data=True)).status_code == 422, "16 MB as they are"
    assert ask(server, "linear", ROW).json()["outputs"][0]["data"] == [2.0, 4.0, 6.0]


def test_an_answer_within_the_limit_is_whole_in_both_forms(server: Server) -> None:
    answer = ask(server, "expanding", zeros(900, 1000)).json()["outputs"][0]
    assert (answer["shape"], set(answer["data"]), len(answer["data"])) == ([900, 1000], {0.0}, 900_000)
    binary = ask(server, "expanding", zeros(900, 1000, binary_data=True))
    header = int(binary.headers["inference-header-content-length"])
    assert binary.content[header:] == bytes(4 * 900_000)


def test_rows_times_classes_are_capped(server: Server) -> None:
    def classified(rows: int, classes: int) -> requests.Response:
        entry = {"name": "x", "shape": [rows, 1], "datatype": "FP32", "data": [1] * rows}
        outputs = [{"name": "y", "parameters": {"classification": classes}}]
        return ask(server, "wide", {"inputs": [entry], "outputs": outputs})

    refused = classified(300, 1000)
    assert refused.status_code == 422
    assert "300000 strings, the limit is 262144" in refused.json()["error"]
    found = classified(200, 5).json()["outputs"][0]
    assert found["shape"] == [200, 5]
    assert found["data"][:2] == ["1.000000:999", "0.997998:998"]
    assert classified(2, 2**40).json()["outputs"][0]["shape"] == [2, 1000], "more classes than there are: all of them"


def test_the_deadline_holds_for_writing(server: Server) -> None:
    began = time.monotonic()
    answer = ask(server, "expanding", zeros(1000, 1000), headers={"x-request-timeout-ms": "40"})
    assert answer.status_code in (200, 504)
    assert time.monotonic() - began < 5.0
    until_s = time.monotonic() + 10
    while server.call_plain(lambda: server.manager.budget.used):  # the thread ends at its next piece
        assert time.monotonic() < until_s
        time.sleep(0.02)


REQUEST = InferRequest(None, {}, (WantedOutput("y", is_binary=False),), 1)
BINARY = InferRequest(None, {}, (WantedOutput("y", is_binary=True),), 1)
SIGNATURE = wide_signature(-1)


@pytest.mark.parametrize("array", [
    np.random.default_rng(0).normal(size=(3, 50_000)).astype(np.float32),
    np.where(np.arange(50_000) % 7 == 0, np.nan, 1.5).astype(np.float32).reshape(2, -1),
    np.arange(-40_000, 40_000, dtype=np.int64).reshape(4, -1),
    (np.arange(40_000) % 3 == 0).reshape(2, -1),
    np.array(['a"b\\c', "", "ü"] * 20_000, dtype=object).reshape(3, -1),
    np.zeros((5, 40_000), np.float32)[:, ::2],
])  # fmt: skip
def test_an_answer_written_in_pieces_is_the_one_written_at_once(array: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = AnswerWriter("m", 1, make_info(SIGNATURE), 1 << 40)
    assert writer.write(REQUEST, {"y": array}) is None or array.dtype.kind in "bi", "not on the loop"
    whole = orjson.dumps(write_json(array), option=orjson.OPT_SERIALIZE_NUMPY)
    large = writer.write_large(REQUEST, {"y": array}, lambda: None)
    assert orjson.loads(large.body)["outputs"][0]["data"] == orjson.loads(whole)
    assert orjson.loads(large.body)["outputs"][0]["shape"] == list(array.shape)
    monkeypatch.setattr(answer, "INLINE_S", math.inf)
    at_once = AnswerWriter("m", 1, make_info(SIGNATURE), 1 << 40).write(BINARY, {"y": array})
    assert writer.write_large(BINARY, {"y": array}, lambda: None) == at_once


def test_strings_are_counted_while_they_are_written() -> None:
    writer = AnswerWriter("m", 1, make_info(SIGNATURE), 100_000)
    texts = np.array(["x" * 50] * 10_000, dtype=object)
    pieces = 0

    def pause() -> None:
        nonlocal pieces
        pieces += 1

    with pytest.raises(AnswerTooLarge, match="limit is 100000"):
        writer.write_large(REQUEST, {"y": texts}, pause)
    assert pieces <= 1, "it went on beyond the limit"


def test_writing_ends_once_it_is_cancelled() -> None:
    def gone() -> None:
        raise RunStopped("gone")

    writer = AnswerWriter("m", 1, make_info(SIGNATURE), 1 << 30)
    with pytest.raises(RunStopped):
        writer.write_large(REQUEST, {"y": np.zeros(1_000_000, np.float32)}, gone)


def test_the_same_holds_for_grpc() -> None:
    codec = MessageCodec("m", 1, make_info(SIGNATURE), 1 << 20)
    with pytest.raises(AnswerTooLarge) as refused:
        codec.write_message(BINARY, {"y": np.zeros((1, 300_000), np.float32)})
    assert status_of(refused.value).code is grpc.StatusCode.FAILED_PRECONDITION
    array = np.arange(200_000, dtype=np.float32).reshape(2, -1)
    assert codec.write_message(REQUEST, {"y": array}) is None, "not on the loop"
    typed = pb.ModelInferResponse.FromString(join(codec.write_large(REQUEST, {"y": array}, lambda: None)))
    assert np.array_equal(typed.outputs[0].contents.fp32_contents, array.ravel())


def test_a_million_equal_scores_are_classified_without_sorting_them_all() -> None:
    scores = np.zeros((1, 1_000_000), np.float32)
    scores[0, 777] = 1.0
    found = classify(scores, 3, None, is_batched=True)
    assert found.tolist() == [["1.000000:777", "0.000000:0", "0.000000:1"]]
