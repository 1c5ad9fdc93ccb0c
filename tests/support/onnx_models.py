"""Small ONNX graphs and bundles, built node by node: fast, and independent of any exporter."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from maas_ray.bundle.format import Bundle, BundleInfo, Lineage, Signature, TensorSpec, save_bundle
from maas_ray.store.objects import ObjectStore

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]


def make_graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), tensors)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=9)


def value(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def linear(scale: float = 2.0, offset: float = 0.0, width: int = 3) -> bytes:
    """y = scale * x + offset, row by row: FP32 [-1, width] to FP32 [-1, width]."""
    model = make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "offset"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", width])],
        [value("y", TensorProto.FLOAT, ["n", width])],
        {"scale": np.float32([scale]), "offset": np.float32([offset])},
    )
    return model.SerializeToString()


LINEAR = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),),
)


def lookup() -> bytes:
    """y = table[index]: an index outside 0..4 makes the whole run fail, as a poison row does."""
    model = make_graph(
        [helper.make_node("Gather", ["table", "index"], ["y"])],
        [value("index", TensorProto.INT64, ["n", 1])],
        [value("y", TensorProto.FLOAT, ["n", 1])],
        {"table": np.arange(5, dtype=np.float32) * 10},
    )
    return model.SerializeToString()


LOOKUP = Signature(
    inputs=(TensorSpec(name="index", datatype="INT64", shape=(-1, 1)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),),
)


def mixed() -> bytes:
    """A categorical string and a nullable number: code = LabelEncoder(color), shown = age or 30 where missing."""
    model = make_graph(
        [
            helper.make_node(
                "LabelEncoder", ["color"], ["code"], domain="ai.onnx.ml",
                keys_strings=["red", "green", ""], values_int64s=[1, 2, 0], default_int64=-1,
            ),
            helper.make_node("IsNaN", ["age"], ["missing"]),
            helper.make_node("Where", ["missing", "fill", "age"], ["shown"]),
            helper.make_node("Identity", ["color"], ["echo"]),
        ],
        [value("color", TensorProto.STRING, ["n", 1]), value("age", TensorProto.FLOAT, ["n", 1])],
        [
            value("code", TensorProto.INT64, ["n", 1]),
            value("shown", TensorProto.FLOAT, ["n", 1]),
            value("echo", TensorProto.STRING, ["n", 1]),
        ],
        {"fill": np.float32([30.0])},
    )  # fmt: skip
    return model.SerializeToString()


MIXED = Signature(
    inputs=(
        TensorSpec(name="color", datatype="BYTES", shape=(-1, 1), nullable=True),
        TensorSpec(name="age", datatype="FP32", shape=(-1, 1), nullable=True),
    ),
    outputs=(
        TensorSpec(name="code", datatype="INT64", shape=(-1, 1)),
        TensorSpec(name="shown", datatype="FP32", shape=(-1, 1)),
        TensorSpec(name="echo", datatype="BYTES", shape=(-1, 1)),
    ),
)


def unbatched() -> bytes:
    """total = sum of a fixed vector: no batch dimension, so requests are never merged."""
    model = make_graph(
        [helper.make_node("ReduceSum", ["v"], ["total"], keepdims=1)],
        [value("v", TensorProto.FLOAT, [4])],
        [value("total", TensorProto.FLOAT, [1])],
    )
    return model.SerializeToString()


UNBATCHED = Signature(
    inputs=(TensorSpec(name="v", datatype="FP32", shape=(4,)),),
    outputs=(TensorSpec(name="total", datatype="FP32", shape=(1,)),),
)


def marking() -> bytes:
    """Echoes each row's mark, sums the row and looks up a number; an index outside 0..4 fails the whole run."""
    model = make_graph(
        [
            helper.make_node("Add", ["mark", "zero"], ["echo"]),
            helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=1),
            helper.make_node("Gather", ["table", "index"], ["found"]),
        ],
        [
            value("mark", TensorProto.INT64, ["n", 1]),
            value("x", TensorProto.FLOAT, ["n", "width"]),
            value("index", TensorProto.INT64, ["n", 1]),
        ],
        [
            value("echo", TensorProto.INT64, ["n", 1]),
            value("total", TensorProto.FLOAT, ["n", 1]),
            value("found", TensorProto.FLOAT, ["n", 1]),
        ],
        {
            "zero": np.int64([0]),
            "axis": np.int64([1]),
            "table": np.arange(5, dtype=np.float32) * 10,
        },
    )
    return model.SerializeToString()


MARKING = Signature(
    inputs=(
        TensorSpec(name="mark", datatype="INT64", shape=(-1, 1)),
        TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),
        TensorSpec(name="index", datatype="INT64", shape=(-1, 1)),
    ),
    outputs=(
        TensorSpec(name="echo", datatype="INT64", shape=(-1, 1)),
        TensorSpec(name="total", datatype="FP32", shape=(-1, 1)),
        TensorSpec(name="found", datatype="FP32", shape=(-1, 1)),
    ),
)


def make_info(signature: Signature = LINEAR, run: str = "run-1", labels: tuple[str, ...] | None = None) -> BundleInfo:
    lineage = Lineage(run=run, step=1, checkpoint_digest="c", data_digest="d", spec_digest="s")
    return BundleInfo(signature=signature, task="other", labels=labels, parity={}, metrics={}, lineage=lineage)


def make_bundle(graph: bytes | None = None, signature: Signature = LINEAR, run: str = "run-1") -> Bundle:
    return Bundle("test", make_info(signature, run), linear() if graph is None else graph)


def commit_bundle(store: ObjectStore, graph: bytes | None = None, signature: Signature = LINEAR, run: str = "r") -> str:
    return save_bundle(store, make_info(signature, run), linear() if graph is None else graph)
