"""Graphs that take long or give much for small requests: what decides is a value, or a free length."""

import numpy as np
from onnx import GraphProto, TensorProto, helper

from maas_ray.bundle.format import Signature, TensorSpec
from tests.support.onnx_models import OPSETS, make_graph, value


def _counting_body() -> GraphProto:
    return helper.make_graph(
        [helper.make_node("Add", ["count", "one"], ["counted"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [
            value("turn", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("count", TensorProto.FLOAT, [1]),
        ],
        [value("go_on", TensorProto.BOOL, []), value("counted", TensorProto.FLOAT, [1])],
    )


def looping() -> bytes:
    """y = n, counted in a Loop of n turns: INT64 [1] to FP32 [1]. About a microsecond per turn."""
    model = make_graph(
        [
            helper.make_node("Squeeze", ["n"], ["turns"]),
            helper.make_node("Loop", ["turns", "yes", "zero"], ["y"], body=_counting_body()),
        ],
        [value("n", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        {"yes": np.array(True), "zero": np.float32([0]), "one": np.float32([1])},
    )
    return model.SerializeToString()


LOOPING = Signature(
    inputs=(TensorSpec(name="n", datatype="INT64", shape=(1,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(1,)),),
)


def looping_in_a_function() -> bytes:
    """The same, with the Loop in a function of the model."""
    function = helper.make_function(
        "local", "Count", ["n", "yes", "zero", "one"], ["y"],
        [
            helper.make_node("Squeeze", ["n"], ["turns"]),
            helper.make_node("Loop", ["turns", "yes", "zero"], ["y"], body=_counting_body()),
        ],
        OPSETS,
    )  # fmt: skip
    model = make_graph(
        [helper.make_node("Count", ["n", "yes", "zero", "one"], ["y"], domain="local")],
        [value("n", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        {"yes": np.array(True), "zero": np.float32([0]), "one": np.float32([1])},
    )
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(function)
    return model.SerializeToString()


def pairwise() -> bytes:
    """y = sum over all pairs of x_i * x_j: FP32 [length] to FP32 [1], in a time that grows with the square of it."""
    model = make_graph(
        [
            helper.make_node("Unsqueeze", ["x", "first"], ["row"]),
            helper.make_node("Unsqueeze", ["x", "second"], ["column"]),
            helper.make_node("Mul", ["row", "column"], ["pairs"]),
            helper.make_node("Tanh", ["pairs"], ["bent"]),
            helper.make_node("ReduceMean", ["bent"], ["mean"], keepdims=0),
            helper.make_node("Reshape", ["mean", "one"], ["y"]),
        ],
        [value("x", TensorProto.FLOAT, ["length"])],
        [value("y", TensorProto.FLOAT, [1])],
        {"first": np.int64([0]), "second": np.int64([1]), "one": np.int64([1])},
    )
    return model.SerializeToString()


PAIRWISE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(1,)),),
)


def expanding() -> bytes:
    """y = zeros of the shape that the values say: INT64 [2] to FP32 [?, ?]."""
    model = make_graph(
        [helper.make_node("Expand", ["zero", "shape"], ["y"])],
        [value("shape", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, ["a", "b"])],
        {"zero": np.float32([0])},
    )
    return model.SerializeToString()


EXPANDING = Signature(
    inputs=(TensorSpec(name="shape", datatype="INT64", shape=(2,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, -1)),),
)


def wide(width: int = 1000) -> bytes:
    """Scores of `width` classes: FP32 [-1, 1] to FP32 [-1, width]."""
    model = make_graph(
        [helper.make_node("Mul", ["x", "scores"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 1])],
        [value("y", TensorProto.FLOAT, ["n", width])],
        {"scores": np.linspace(-1, 1, width, dtype=np.float32)},
    )
    return model.SerializeToString()


def wide_signature(width: int = 1000) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, width)),),
    )
