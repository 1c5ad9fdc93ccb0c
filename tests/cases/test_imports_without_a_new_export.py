"""Classifiers with ZipMap, inputs with default values, tensors of unknown rank and quantized files were not
imported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import requests
from onnx import TensorProto, helper, numpy_helper

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import load_bundle
from maas_ray.bundle.graph import contrib
from maas_ray.bundle.graph.checks import inspect_graph, signature_of
from maas_ray.errors import BundleError, SpecError
from maas_ray.registry.adapting import read_shapes
from maas_ray.registry.importing import import_onnx
from maas_ray.store.objects import ObstoreStore, open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import make_graph, value


def zip_mapped(classes: list[str] | list[int]) -> onnx.ModelProto:
    """As scikit-learn's and onnxmltools' converters write a classifier by default."""
    keys = {"classlabels_strings": classes} if isinstance(classes[0], str) else {"classlabels_int64s": classes}
    nodes = [
        helper.make_node("Softmax", ["x"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["probabilities"], ["output_probability"], domain="ai.onnx.ml", **keys),
    ]
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(
            TensorProto.STRING if isinstance(classes[0], str) else TensorProto.INT64,
            helper.make_tensor_type_proto(TensorProto.FLOAT, []),
        )
    )
    outputs = [value("label", TensorProto.INT64, ["N"]), onnx.ValueInfoProto(name="output_probability", type=maps)]
    return make_graph(nodes, [value("x", TensorProto.FLOAT, ["N", 3])], outputs)


def defaulted() -> onnx.ModelProto:
    """y = x * scale + offset; scale may be sent, and offset as well."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "offset"], ["y"])]
    inputs = [
        value("x", TensorProto.FLOAT, ["n", 2]),
        value("scale", TensorProto.FLOAT, []),
        value("offset", TensorProto.FLOAT, [2]),
    ]
    weights = {"scale": np.array(2, np.float32), "offset": np.float32([0, 1])}
    return make_graph(nodes, inputs, [value("y", TensorProto.FLOAT, ["n", 2])], weights)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("classes", [["cat", "dog", "eel"], [7, 8, 9]])
def test_a_final_zip_map_is_replaced_by_its_input_tensor(
    file_store: ObstoreStore, tmp_path: Path, classes: list[Any]
) -> None:
    imported = import_onnx(file_store, save(zip_mapped(classes), tmp_path / "m.onnx"))
    label, probabilities = imported.info.signature.outputs
    assert (label.datatype, probabilities.name, probabilities.datatype) == ("INT64", "output_probability", "FP32")
    assert probabilities.shape == (-1, 3)
    assert imported.info.labels == tuple(map(str, classes))
    assert "ZipMap was removed" in imported.info.parity["changes"][0]
    engine = Engine(load_bundle(file_store, imported.bundle_id))
    rows = np.float32([[1, 2, 3], [3, 0, 0]])
    expected = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(engine.run({"x": rows})["output_probability"], expected, rtol=1e-5)
    engine.close()


def test_scikit_learns_default_classifier_is_imported(file_store: ObstoreStore, tmp_path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    x = np.random.default_rng(0).random((60, 4)).astype(np.float32)
    fitted = LogisticRegression().fit(x, np.array(["low", "high"])[(x.sum(axis=1) > 2).astype(int)])
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(fitted, x[:1]).SerializeToString())
    imported = import_onnx(file_store, path)
    engine = Engine(load_bundle(file_store, imported.bundle_id))
    outputs = engine.run({imported.info.signature.inputs[0].name: x})
    np.testing.assert_allclose(outputs["output_probability"], fitted.predict_proba(x), rtol=1e-4)
    assert imported.info.labels == ("high", "low")
    engine.close()


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None)), "is a sequence"),
        (helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [])), "is a optional value"),
        (
            helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])),
            "is a map",
        ),
    ],
)
def test_values_that_are_not_tensors_are_refused_with_their_type_and_the_way_out(kind: Any, shown: str) -> None:
    model = make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n"])],
        [onnx.ValueInfoProto(name="y", type=kind)],
    )
    with pytest.raises(BundleError) as refused:
        signature_of(model.SerializeToString())
    assert f"output 'y' {shown}" in str(refused.value)
    assert "zipmap=False" in str(refused.value)
    assert "has no shape" not in str(refused.value)


def test_inputs_with_default_values_are_optional(file_store: ObstoreStore, tmp_path: Path) -> None:
    imported = import_onnx(file_store, save(defaulted(), tmp_path / "m.onnx"))
    assert [(tensor.name, tensor.optional) for tensor in imported.info.signature.inputs] == [
        ("x", False), ("scale", True), ("offset", True),
    ]  # fmt: skip
    assert imported.info.parity["can_merge"]
    engine = Engine(load_bundle(file_store, imported.bundle_id))
    x = np.float32([[1, 1]])
    assert engine.run({"x": x})["y"].tolist() == [[2, 3]]
    assert engine.run({"x": x, "scale": np.array(10, np.float32)})["y"].tolist() == [[10, 11]]
    engine.close()


def test_an_older_bundle_without_these_fields_is_served_unchanged() -> None:
    model = defaulted()
    signature = signature_of(model.SerializeToString())
    inspect_graph(model.SerializeToString(), signature.model_copy(update={"inputs": signature.required}))
    with pytest.raises(BundleError, match="'x' is declared optional"):
        wrong = tuple(tensor.model_copy(update={"optional": True}) for tensor in signature.inputs)
        inspect_graph(model.SerializeToString(), signature.model_copy(update={"inputs": wrong}))


def test_constants_of_old_files_are_not_inputs() -> None:
    model = defaulted()
    model.ir_version = 3
    assert [tensor.name for tensor in signature_of(model.SerializeToString()).inputs] == ["x"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path: Path = tmp_path_factory.mktemp("optional")
    store = open_store(f"file://{path}/store")
    publish(store, "m", import_onnx(store, save(defaulted(), path / "m.onnx")).bundle_id)
    yield from serve_app(store, app_spec(store, "m", batching={"max_delay_ms": 20}), "protocol")


def test_requests_may_leave_optional_inputs_out_and_share_no_run_with_those_that_do_not(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    metadata = requests.get(f"{server.url}/v2/models/m", timeout=20).json()
    assert [tensor.get("parameters") for tensor in metadata["inputs"]] == [None, {"optional": True}, {"optional": True}]
    config = requests.get(f"{server.url}/v2/models/m/config", timeout=20).json()
    assert [tensor["optional"] for tensor in config["input"]] == [False, True, True]

    def ask(number: int) -> tuple[int, Any]:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [number, number]}]
        if number % 3:
            inputs.append({"name": "scale", "datatype": "FP32", "shape": [], "data": [number % 3 * 10]})
        if number % 2:
            inputs.append({"name": "offset", "datatype": "FP32", "shape": [2], "data": [5, 6]})
        answer = requests.post(f"{server.url}/v2/models/m/infer", json={"inputs": inputs}, timeout=20)
        return number, answer.json()["outputs"][0]["data"] if answer.ok else answer.text

    with ThreadPoolExecutor(16) as threads:
        for number, found in threads.map(ask, range(96)):
            scale, offset = number % 3 * 10 or 2, (5, 6) if number % 2 else (0, 1)
            assert found == [number * scale + offset[0], number * scale + offset[1]]


def test_binary_requests_may_leave_them_out_again_and_again(server: Server) -> None:
    from tritonclient import http as triton

    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        x = triton.InferInput("x", [1, 2], "FP32").set_data_from_numpy(np.float32([[1, 1]]))
        scale = triton.InferInput("scale", [], "FP32").set_data_from_numpy(np.array(3, np.float32))
        for _ in range(4):
            assert client.infer("m", [x]).as_numpy("y").tolist() == [[2, 3]]
            assert client.infer("m", [scale, x]).as_numpy("y").tolist() == [[3, 4]]


def test_a_missing_input_that_is_not_optional_is_still_refused(server: Server) -> None:
    scale = {"name": "scale", "datatype": "FP32", "shape": [], "data": [1]}
    answer = requests.post(f"{server.url}/v2/models/m/infer", json={"inputs": [scale]}, timeout=20)
    assert answer.status_code == 400
    assert "missing input 'x'" in answer.json()["error"]


def unranked() -> onnx.ModelProto:
    model = make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.ClearField("shape")
    return model


def test_a_tensor_of_unknown_rank_is_given_its_shape_at_import(file_store: ObstoreStore, tmp_path: Path) -> None:
    path = save(unranked(), tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=r"input 'x' has no shape in the graph; set it \(--shape x=-1,3\)"):
        import_onnx(file_store, path)
    imported = import_onnx(file_store, path, shapes=read_shapes(["x=-1,3"]))
    assert [tensor.shape for tensor in (*imported.info.signature.inputs, *imported.info.signature.outputs)] == [
        (-1, 3)
    ] * 2
    assert imported.info.parity["can_merge"]
    assert import_onnx(file_store, path, shapes=read_shapes(["x=3"])).info.signature.outputs[0].shape == (3,)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(["z=1"], "'z': no such input or output"), (["y=-1,4", "x=-1,3"], "'y' contradicts the shape")],
)
def test_a_shape_for_nothing_is_refused(
    file_store: ObstoreStore, tmp_path: Path, shapes: list[str], message: str
) -> None:
    with pytest.raises((SpecError, BundleError), match=message):
        import_onnx(file_store, save(unranked(), tmp_path / "m.onnx"), shapes=read_shapes(shapes))


def test_a_shape_against_the_graph_is_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    path = save(defaulted(), tmp_path / "m.onnx")
    with pytest.raises(SpecError, match="contradicts the shape"):
        import_onnx(file_store, path, shapes=read_shapes(["x=-1,3"]))
    assert import_onnx(file_store, path, shapes=read_shapes(["x=4,2"])).info.signature.inputs[0].shape == (4, 2)


@pytest.mark.parametrize("text", ["x", "=1", "x=a b", "x=-2", "x=1;2", "x=1.5"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is not of the form NAME=SIZES"):
        read_shapes([text])


def perceptron() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    weights = {
        "w": random.standard_normal((8, 16)).astype(np.float32),
        "v": random.standard_normal((16, 4)).astype(np.float32),
    }
    return make_graph(
        nodes, [value("x", TensorProto.FLOAT, ["n", 8])], [value("y", TensorProto.FLOAT, ["n", 4])], weights
    )


class Calibration:
    """Sample reader for `quantize_static`."""

    def __init__(self) -> None:
        rows = np.random.default_rng(1).random((8, 8)).astype(np.float32)
        self._samples = iter([{"x": row[None]} for row in rows])

    def get_next(self) -> Any:
        return next(self._samples, None)


@pytest.mark.parametrize("how", ["dynamic", "QDQ", "QOperator"])
def test_files_of_onnxruntimes_own_quantization_come_in(file_store: ObstoreStore, tmp_path: Path, how: str) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static

    source, path = save(perceptron(), tmp_path / "m.onnx"), tmp_path / "q.onnx"
    if how == "dynamic":
        quantize_dynamic(source, path)
    else:
        quantize_static(source, path, Calibration(), quant_format=QuantFormat[how])
    imported = import_onnx(file_store, path)
    engine = Engine(load_bundle(file_store, imported.bundle_id))
    x = np.random.default_rng(2).random((3, 8)).astype(np.float32)
    (expected,) = ort.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(engine.run({"x": x})["y"], expected, rtol=1e-5)
    engine.close()


def root_mean_square(width: int = 8) -> onnx.ModelProto:
    """y = x / sqrt(mean(x * x) + 1e-6) * scale, as the exporters of Llama and T5 write it."""
    constants = {"two": 2.0, "eps": 1e-6, "scale": np.linspace(0.5, 1.5, width)}
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[-1], keepdims=1),
        helper.make_node("Add", ["mean", "eps"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["normal"]),
        helper.make_node("Mul", ["normal", "scale"], ["y"]),
    ]
    shape = ["batch", width]
    model = make_graph(nodes, [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)])
    model.opset_import[0].version = 17
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(constant, np.float32), name) for name, constant in constants.items()
    )
    return model


def test_a_graph_optimized_by_onnxruntime_is_imported(file_store: ObstoreStore, tmp_path: Path) -> None:
    """Its fusions of Llama and T5 leave an operator without a domain that ONNX does not know."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(root_mean_square().SerializeToString(), options)
    nodes = {(node.domain, node.op_type) for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert nodes == {("", "SimplifiedLayerNormalization")}
    imported = import_onnx(file_store, tmp_path / "optimized.onnx")
    bundle = load_bundle(file_store, imported.bundle_id)
    assert onnx.load_model_from_string(bundle.graph).graph.node[0].domain == ""
    engine = Engine(bundle)
    assert engine.can_merge
    x = np.random.default_rng(2).random((3, 8)).astype(np.float32)
    np.testing.assert_allclose(engine.run({"x": x})["y"], session.run(None, {"x": x})[0], rtol=1e-5)
    engine.close()


@pytest.mark.parametrize("operator", ["FusedMatMul", "SkipLayerNormalization", "Gelu", "QLinearAdd", "Attention"])
def test_operators_that_onnxruntimes_optimizers_write_are_on_the_list(operator: str) -> None:
    assert operator in contrib.OPERATORS


@pytest.mark.parametrize("operator", ["EPContext", "Snpe", "BeamSearch", "NoSuchOperator"])
def test_other_operators_of_its_domain_are_refused(operator: str) -> None:
    node = helper.make_node(operator, ["x"], ["y"], domain="com.microsoft")
    model = make_graph([node], [value("x", TensorProto.FLOAT, ["n"])], [value("y", TensorProto.FLOAT, ["n"])])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph = model.SerializeToString()
    with pytest.raises(BundleError, match=f"com.microsoft::{operator}"):
        inspect_graph(graph, signature_of(graph))


def test_everything_on_the_list_is_there() -> None:
    from onnxruntime.capi import _pybind_state

    known = {schema.name for schema in _pybind_state.get_all_operator_schema() if schema.domain == contrib.DOMAIN}
    assert known >= contrib.OPERATORS
