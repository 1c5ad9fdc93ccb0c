"""Models that refuse blank values were neither imported nor served, and one of them made its whole pool
unavailable.

Required: a refusal of generated values proves nothing about a model: it is imported and served, and a note reports that
it had no warm-up. A model that onnxruntime cannot load is refused at import, also without the check.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import requests
from onnx import TensorProto as T
from onnx import helper

from maas_ray.bundle.format import load_bundle
from maas_ray.errors import SpecError
from maas_ray.registry.importing import import_onnx
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore, open_store
from tests.serve.conftest import Server, app_spec, serve_app
from tests.support.onnx_models import lookup, make_graph, value


def simple_string() -> onnx.ModelProto:
    """Triton's: two tensors of texts that must read as numbers; their sum and difference as texts."""
    nodes = [
        *(helper.make_node("Cast", [f"INPUT{i}"], [f"n{i}"], to=T.INT32) for i in (0, 1)),
        helper.make_node("Add", ["n0", "n1"], ["sum"]),
        helper.make_node("Sub", ["n0", "n1"], ["difference"]),
        helper.make_node("Cast", ["sum"], ["OUTPUT0"], to=T.STRING),
        helper.make_node("Cast", ["difference"], ["OUTPUT1"], to=T.STRING),
    ]
    return make_graph(
        nodes,
        [value(f"INPUT{i}", T.STRING, ["batch", 16]) for i in (0, 1)],
        [value(f"OUTPUT{i}", T.STRING, ["batch", 16]) for i in (0, 1)],
    )


def resized() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest")],
        [value("x", T.FLOAT, [1, 1, 2, 2]), value("sizes", T.INT64, [4])],
        [value("y", T.FLOAT, ["a", "b", "c", "d"])],
    )


def divided() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Div", ["a", "b"], ["y"])],
        [value("a", T.INT64, [3]), value("b", T.INT64, [3])],
        [value("y", T.INT64, [3])],
    )


def split() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Split", ["x", "parts"], ["y", "z"], axis=0)],
        [value("x", T.FLOAT, [6]), value("parts", T.INT64, [2])],
        [value("y", T.FLOAT, ["m"]), value("z", T.FLOAT, ["k"])],
    )


def sliced() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])],
        [value("x", T.FLOAT, [20, 10]), *(value(name, T.INT64, [2]) for name in ("starts", "ends", "axes", "steps"))],
        [value("y", T.FLOAT, ["m", "k"])],
    )


def expanded() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        [value("x", T.FLOAT, [3, 1]), value("shape", T.INT64, [3])],
        [value("y", T.FLOAT, ["a", "b", "c"])],
    )


def tensor(name: str, kind: str, shape: list[int], data: list[object]) -> dict[str, object]:
    return {"name": name, "datatype": kind, "shape": shape, "data": data}


CASES = {
    "simple_string": (
        simple_string(),
        [tensor("INPUT0", "BYTES", [1, 16], [str(i) for i in range(16)]), tensor("INPUT1", "BYTES", [1, 16], ["1"] * 16)],
        [[str(i + 1) for i in range(16)], [str(i - 1) for i in range(16)]],
    ),
    "resize": (
        resized(),
        [tensor("x", "FP32", [1, 1, 2, 2], [1, 2, 3, 4]), tensor("sizes", "INT64", [4], [1, 1, 4, 2])],
        [[1, 2, 1, 2, 3, 4, 3, 4]],
    ),
    "divide": (
        divided(), [tensor("a", "INT64", [3], [7, 8, 9]), tensor("b", "INT64", [3], [2, 4, -3])], [[3, 2, -3]],
    ),
    "split": (
        split(),
        [tensor("x", "FP32", [6], [1, 2, 3, 4, 5, 6]), tensor("parts", "INT64", [2], [2, 4])],
        [[1, 2], [3, 4, 5, 6]],
    ),
    "slice": (
        sliced(),
        [
            tensor("x", "FP32", [20, 10], list(range(200))), tensor("starts", "INT64", [2], [1, 0]),
            tensor("ends", "INT64", [2], [3, 4]), tensor("axes", "INT64", [2], [0, 1]), tensor("steps", "INT64", [2], [1, 2]),
        ],
        [[10, 12, 20, 22]],
    ),
    "expand": (
        expanded(),
        [tensor("x", "FP32", [3, 1], [1, 2, 3]), tensor("shape", "INT64", [3], [2, 1, 2])],
        [[1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3]],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s4")
    store = open_store(f"file://{folder}/store")
    registry = Registry(store)
    for number, (name, (model, _, _)) in enumerate(CASES.items()):
        path = folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        imported = import_onnx(store, path, is_checked=bool(number % 2))
        registry.promote(name, registry.publish(name, imported.bundle_id).version)
    yield from serve_app(store, app_spec(store, *CASES), "protocol")


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_refuses_blank_values_is_imported_and_answers_rightly(server: Server, name: str) -> None:
    _, inputs, outputs = CASES[name]
    answer = requests.post(f"{server.url}/v2/models/{name}/infer", json={"inputs": inputs}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert [output["data"] for output in answer.json()["outputs"]] == outputs
    assert requests.get(f"{server.url}/v2/models/{name}/ready", timeout=60).status_code == 200


def test_given_values_that_the_model_accepts_are_stored(file_store: ObstoreStore, tmp_path: Path) -> None:
    path = tmp_path / "split.onnx"
    path.write_bytes(split().SerializeToString())
    bare = import_onnx(file_store, path)
    assert "refused" in bare.info.parity["warm_up"]
    request = tmp_path / "sample.json"
    request.write_text(json.dumps({"inputs": CASES["split"][1]}))
    arrays = tmp_path / "sample.npz"
    np.savez(arrays, x=np.arange(6, dtype=np.float32), parts=np.array([2, 4]))
    for sample in (request, arrays):
        imported = import_onnx(file_store, path, sample=sample)
        assert imported.info.parity["warm_up"] == "recorded values"
        assert imported.info.parity["run"] == "passed"
        assert load_bundle(file_store, imported.bundle_id).sample is not None


def test_a_sample_that_does_not_fit_is_refused_by_name(file_store: ObstoreStore, tmp_path: Path) -> None:
    path = tmp_path / "lookup.onnx"
    path.write_bytes(lookup())
    for name, content, says in (
        ("wrong.json", b'{"inputs": [{"name": "index", "shape": [1, 2], "data": [1, 2]}]}', "has the shape"),
        ("none.json", b"{", "not JSON"),
        ("none.npz", b"PK", "not an .npz file"),
    ):
        sample = tmp_path / name
        sample.write_bytes(content)
        with pytest.raises(SpecError, match=says):
            import_onnx(file_store, path, sample=sample)
    with pytest.raises(SpecError, match="does not exist"):
        import_onnx(file_store, path, sample=tmp_path / "nothing.npz")
