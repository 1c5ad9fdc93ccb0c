"""Strings that are not UTF-8 got 500 as outputs and were refused as inputs. Binary data allows them, JSON does
not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from onnx import TensorProto, helper

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.bundle.strings import decode, encode
from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, make_bundle, make_graph, value

TEXTS = [b"plain", "é".encode(), b"\xff\xfe", b"\x80" * 100, b"nul\x00\xffinside", b""]
"""Short ones are stored inside a string's own object, long ones elsewhere."""
BYTES = TensorSpec(name="text", datatype="BYTES", shape=(-1,))
NUMBER = TensorSpec(name="number", datatype="INT64", shape=(-1,))


def echo() -> tuple[bytes, Signature]:
    model = make_graph(
        [helper.make_node("Identity", ["text"], ["out"])],
        [value("text", TensorProto.STRING, ["n"])],
        [value("out", TensorProto.STRING, ["n"])],
    )
    return model.SerializeToString(), Signature(inputs=(BYTES,), outputs=(BYTES.model_copy(update={"name": "out"}),))


def names() -> tuple[bytes, Signature]:
    """A table of strings inside the graph, as a model trained on a file in Latin-1 has it."""
    node = helper.make_node(
        "LabelEncoder", ["number"], ["out"], domain="ai.onnx.ml",
        keys_int64s=list(range(len(TEXTS))), values_strings=TEXTS, default_string="?",
    )  # fmt: skip
    model = make_graph(
        [node, helper.make_node("Identity", ["number"], ["same"])],
        [value("number", TensorProto.INT64, ["n"])],
        [value("out", TensorProto.STRING, ["n"]), value("same", TensorProto.INT64, ["n"])],
    )
    outputs = (BYTES.model_copy(update={"name": "out"}), NUMBER.model_copy(update={"name": "same"}))
    return model.SerializeToString(), Signature(inputs=(NUMBER,), outputs=outputs)


def objects(texts: list[bytes]) -> np.ndarray:
    array = np.empty(len(texts), dtype=object)
    array[:] = [decode(text) for text in texts]
    return array


def test_any_bytes_pass_through_a_graph() -> None:
    engine = Engine(make_bundle(*echo()))
    assert [encode(text) for text in engine.run({"text": objects(TEXTS)})["out"].tolist()] == TEXTS
    assert engine.run({"text": objects([b"plain"])})["out"].tolist() == ["plain"]
    engine.close()


def test_a_graph_returns_any_bytes_together_with_its_other_outputs() -> None:
    engine = Engine(make_bundle(*names()))
    outputs = engine.run({"number": np.arange(len(TEXTS))})
    assert [encode(text) for text in outputs["out"].tolist()] == TEXTS
    assert outputs["same"].tolist() == list(range(len(TEXTS)))
    engine.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path: Path = tmp_path_factory.mktemp("strings")
    store = open_store(f"file://{path}/store")
    for name, (graph, signature) in {"echo": echo(), "names": names()}.items():
        publish(store, name, commit_bundle(store, graph, signature))
    yield from serve_app(store, app_spec(store, "echo", "names"), "protocol")


def packed(texts: list[bytes]) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def test_binary_data_carries_them_both_ways(server: Server) -> None:
    data = packed(TEXTS)
    header = (
        b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[%d],"parameters":{"binary_data_size":%d}}],'
        b'"outputs":[{"name":"out","parameters":{"binary_data":true}}]}' % (len(TEXTS), len(data))
    )
    lengths = {"inference-header-content-length": str(len(header))}
    answer = requests.post(f"{server.url}/v2/models/echo/infer", header + data, headers=lengths, timeout=20)
    assert answer.status_code == 200, answer.text
    assert answer.content[int(answer.headers["inference-header-content-length"]) :] == data


def test_json_refuses_them_with_the_reason(server: Server) -> None:
    def ask(number: int) -> requests.Response:
        tensor = {"name": "number", "datatype": "INT64", "shape": [1], "data": [number]}
        return requests.post(f"{server.url}/v2/models/names/infer", json={"inputs": [tensor]}, timeout=20)

    assert ask(1).json()["outputs"][0]["data"] == ["é"]
    answer = ask(2)
    assert answer.status_code == 400
    assert "not UTF-8" in answer.json()["error"]
    assert "binary_data" in answer.json()["error"]
