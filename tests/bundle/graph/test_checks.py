"""Checks of a graph before onnxruntime loads it."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.bundle.graph.checks import inspect_graph, signature_of
from maas_ray.errors import BundleError
from tests.support.onnx_models import (
    LINEAR,
    LOOKUP,
    MIXED,
    UNBATCHED,
    linear,
    lookup,
    make_graph,
    mixed,
    unbatched,
    value,
)


@pytest.mark.parametrize(
    ("graph", "signature"),
    [(linear(), LINEAR), (lookup(), LOOKUP), (mixed(), MIXED), (unbatched(), UNBATCHED)],
    ids=["linear", "lookup", "mixed", "unbatched"],
)
def test_a_sound_graph_passes(graph: bytes, signature: Signature) -> None:
    inspect_graph(graph, signature)


@pytest.mark.parametrize(("graph", "signature"), [(linear(), LINEAR), (lookup(), LOOKUP), (unbatched(), UNBATCHED)])
def test_the_signature_can_be_read_from_the_graph(graph: bytes, signature: Signature) -> None:
    assert signature_of(graph) == signature


def changed(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_model_from_string(linear())
    change(model)
    return model.SerializeToString()


def put_weights_outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def use_foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def hide_foreign_operator_in_a_branch(model: onnx.ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Evil", ["x"], ["z"], domain="com.example")],
        "b",
        [],
        [value("z", TensorProto.FLOAT, ["n", 3])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch))


def lie_about_a_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 1_000_000


def break_the_wiring(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_weights_outside, "is stored outside the file"),
        (use_foreign_operator, "com.example::Mul"),
        (hide_foreign_operator_in_a_branch, "com.example::Evil"),
        (lie_about_a_tensor, "instead of 4000000"),
        (break_the_wiring, "onnx checker rejects"),
    ],
)
def test_an_unsound_graph_is_refused(change: Callable[[onnx.ModelProto], None], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        inspect_graph(changed(change), LINEAR)


@pytest.mark.parametrize("graph", [b"", b"\xff\xfe not a model", b"PK\x03\x04" * 100])
def test_bytes_without_a_graph_are_refused(graph: bytes) -> None:
    with pytest.raises(BundleError):
        inspect_graph(graph, LINEAR)


def tensor(name: str = "x", datatype: str = "FP32", shape: tuple[int, ...] = (-1, 3)) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((tensor("z"),), "declares the inputs"),
        ((tensor(), tensor("more")), "declares the inputs"),
        ((tensor(datatype="FP64"),), "declared as FP64, but is FP32 in the graph"),
        ((tensor(shape=(-1, 4)),), r"declared with the shape \[-1, 4\]"),
        ((tensor(shape=(2, 3)),), r"declared with the shape \[2, 3\]"),
        ((tensor(shape=(-1,)),), r"declared with the shape \[-1\]"),
    ],
)
def test_a_signature_that_is_not_the_graphs_is_refused(inputs: tuple[TensorSpec, ...], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        inspect_graph(linear(), Signature(inputs=inputs, outputs=LINEAR.outputs))


def test_a_datatype_that_the_protocol_does_not_have_is_refused() -> None:
    model = make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT8E4M3FN, ["n", 3])],
        [value("y", TensorProto.FLOAT8E4M3FN, ["n", 3])],
    )
    signature = Signature(inputs=(tensor("x", "UINT8"),), outputs=(tensor("y", "UINT8"),))
    with pytest.raises(BundleError, match="not a tensor of a supported datatype"):
        inspect_graph(model.SerializeToString(), signature)
