"""Graphs that crash, hang or swell the process that loads or runs them."""

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper

from maas_ray.bundle.format import Signature, TensorSpec
from tests.support.onnx_models import OPSETS, make_graph, value


def _signature(
    inputs: dict[str, tuple[str, tuple[int, ...]]], outputs: dict[str, tuple[str, tuple[int, ...]]]
) -> Signature:
    def specs(given: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, datatype=kind, shape=shape) for name, (kind, shape) in given.items())  # type: ignore[arg-type]

    return Signature(inputs=specs(inputs), outputs=specs(outputs))


ROWS = _signature({"x": ("FP32", (-1, 3))}, {"y": ("FP32", (-1, 3))})


def dividing() -> bytes:
    """y = a / (b + 1), INT32 by rows: INT_MIN / -1 raises SIGFPE in the processor."""
    model = make_graph(
        [helper.make_node("Add", ["b", "one"], ["c"]), helper.make_node("Div", ["a", "c"], ["y"])],
        [value("a", T.INT32, ["n", 1]), value("b", T.INT32, ["n", 1])],
        [value("y", T.INT32, ["n", 1])],
        {"one": np.int32([1])},
    )
    return model.SerializeToString()


DIVIDING = _signature({"a": ("INT32", (-1, 1)), "b": ("INT32", (-1, 1))}, {"y": ("INT32", (-1, 1))})


def remaining() -> bytes:
    """y = a modulo (b + 1): INT_MIN and -1 raise SIGFPE wherever they are in a batch; a division may be vectorized."""
    model = make_graph(
        [helper.make_node("Add", ["b", "one"], ["c"]), helper.make_node("Mod", ["a", "c"], ["y"])],
        [value("a", T.INT32, ["n", 1]), value("b", T.INT32, ["n", 1])],
        [value("y", T.INT32, ["n", 1])],
        {"one": np.int32([1])},
    )
    return model.SerializeToString()


def deep_tree(depth: int = 20_000) -> bytes:
    """A tree that is a chain: onnxruntime makes a session of it by recursion and overruns the stack."""
    inner, leaves = range(depth), range(depth, 2 * depth + 1)
    zeros = [0] * (2 * depth + 1)
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=zeros, nodes_nodeids=[*inner, *leaves], nodes_featureids=zeros,
        nodes_modes=["BRANCH_LEQ"] * depth + ["LEAF"] * (depth + 1), nodes_values=[0.5] * (2 * depth + 1),
        nodes_truenodeids=[i + 1 for i in inner] + [0] * (depth + 1),
        nodes_falsenodeids=[depth + 1 + i for i in inner] + [0] * (depth + 1),
        target_treeids=[0] * (depth + 1), target_nodeids=list(leaves), target_ids=[0] * (depth + 1),
        target_weights=[1.0] * (depth + 1),
    )  # fmt: skip
    return make_graph([node], [value("x", T.FLOAT, ["n", 3])], [value("y", T.FLOAT, ["n", 1])]).SerializeToString()


DEEP_TREE = _signature({"x": ("FP32", (-1, 3))}, {"y": ("FP32", (-1, 1))})


def endless(turns: int = 2**62) -> bytes:
    """y = x, after a Loop of a constant number of turns that no request can change."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "one"], ["w"])],
        "body",
        [value("turn", T.INT64, []), value("go", T.BOOL, []), value("v", T.FLOAT, [1])],
        [value("go_on", T.BOOL, []), value("w", T.FLOAT, [1])],
    )
    model = make_graph(
        [
            helper.make_node("Loop", ["turns", "yes", "zero"], ["count"], body=body),
            helper.make_node("Mul", ["count", "zero"], ["nothing"]),
            helper.make_node("Add", ["x", "nothing"], ["y"]),
        ],
        [value("x", T.FLOAT, ["n", 3])],
        [value("y", T.FLOAT, ["n", 3])],
        {"turns": np.array(turns), "yes": np.array(True), "zero": np.float32([0]), "one": np.float32([1])},
    )
    return model.SerializeToString()


def doubling(levels: int = 24) -> bytes:
    """Functions of which each calls the one before twice: 2 ** levels nodes once they are put in place."""
    opsets = [*OPSETS, helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", "f0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)]
    for level in range(1, levels + 1):
        name = f"f{level - 1}"
        inner = [
            helper.make_node(name, ["a"], ["m"], domain="local"),
            helper.make_node(name, ["m"], ["b"], domain="local"),
        ]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], inner, opsets))
    call = helper.make_node(f"f{levels}", ["x"], ["y"], domain="local")
    model = make_graph([call], [value("x", T.FLOAT, ["n", 3])], [value("y", T.FLOAT, ["n", 3])])
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.extend(functions)
    return model.SerializeToString()


def chain(length: int = 200_000) -> bytes:
    """Nodes one after the other."""
    nodes = [helper.make_node("Add", [f"x{i}" if i else "x", "zero"], [f"x{i + 1}"]) for i in range(length)]
    nodes.append(helper.make_node("Identity", [f"x{length}"], ["y"]))
    weights = {"zero": np.float32([0])}
    return make_graph(
        nodes, [value("x", T.FLOAT, ["n", 3])], [value("y", T.FLOAT, ["n", 3])], weights
    ).SerializeToString()


def wide(count: int = 20_000) -> bytes:
    """Many inputs."""
    names = [f"x{i}" for i in range(count)]
    model = make_graph(
        [helper.make_node("Sum", names, ["y"])],
        [value(name, T.FLOAT, ["n", 1]) for name in names],
        [value("y", T.FLOAT, ["n", 1])],
    )
    return model.SerializeToString()


def swelling() -> bytes:
    """y = x repeated as often as a value says: a few bytes ask for any amount of memory."""
    model = make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        [value("x", T.FLOAT, [1]), value("shape", T.INT64, [1])],
        [value("y", T.FLOAT, ["m"])],
    )
    return model.SerializeToString()


SWELLING = _signature({"x": ("FP32", (1,)), "shape": ("INT64", (1,))}, {"y": ("FP32", (-1,))})


def of_unknown_version(graph: bytes) -> bytes:
    """The same graph in a version of the format that onnxruntime refuses."""
    model = onnx.load_model_from_string(graph)
    model.ir_version = 99
    return model.SerializeToString()
