import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from maas_ray.bundle.graph.hazards import Hazards, hazards_of
from tests.support.onnx_models import linear, lookup, make_graph, marking, mixed, value

X = [value("x", T.FLOAT, ["n", 4])]
IDS = [value("i", T.INT64, ["n"])]
Y = [value("y", T.FLOAT, None)]


def node(kind: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, [name.strip("_") for name in inputs.split()], outputs.split(), **attributes)


def judge(*nodes: onnx.NodeProto, inputs: object = None, **weights: np.ndarray) -> Hazards:
    return hazards_of(make_graph(nodes, inputs or X + IDS, Y, weights))


@pytest.mark.parametrize("graph", [linear(), lookup(), mixed(), marking()])
def test_everyday_graphs_are_free_of_hazards(graph: bytes) -> None:
    assert hazards_of(onnx.load_model_from_string(graph)) == Hazards(
        has_loops=False, is_value_bounded=True, can_trap=False
    )


ONE = np.array([1], np.int64)

SIZED_BY_VALUES = {
    "expand": node("Expand", "x i"),
    "tile": node("Tile", "x i"),
    "range": node("Range", "i i i"),
    "constant of shape": node("ConstantOfShape", "i"),
    "reshape": node("Reshape", "x i"),
    "pad": node("Pad", "x i"),
    "slice": node("Slice", "x i i"),
    "top k": node("TopK", "x i"),
    "resize": node("Resize", "x _ _ i"),
    "one hot": node("OneHot", "i i x"),
    "nonzero": node("NonZero", "x"),
    "unique": node("Unique", "x"),
    "compress": node("Compress", "x i"),
    "unknown": node("NoSuchOperator", "x"),
}


@pytest.mark.parametrize("name", SIZED_BY_VALUES)
def test_sizes_that_values_decide_are_seen(name: str) -> None:
    found = judge(SIZED_BY_VALUES[name])
    assert not found.is_value_bounded
    assert SIZED_BY_VALUES[name].op_type in found.reasons[0]


@pytest.mark.parametrize("kind", ["Expand", "Tile", "Reshape", "ConstantOfShape"])
@pytest.mark.parametrize("source", ["constant", "shape", "computed"])
def test_sizes_that_are_constant_or_come_from_shapes_are_bounded(kind: str, source: str) -> None:
    before = {
        "constant": [],
        "shape": [node("Shape", "x", "s")],
        "computed": [
            node("Shape", "x", "whole"),
            node("Gather", "whole one", "first"),
            node("Concat", "first one", "s", axis=0),
        ],
    }[source]
    size = "one" if source == "constant" else "s"
    found = judge(*before, node(kind, size if kind == "ConstantOfShape" else f"x {size}"), one=ONE)
    assert found.is_value_bounded, found.reasons


def test_a_size_computed_of_a_value_and_a_shape_is_the_values() -> None:
    found = judge(node("Shape", "x", "s"), node("Add", "s i", "t"), node("Expand", "x t"))
    assert not found.is_value_bounded


def test_an_initializer_that_a_caller_may_replace_is_not_a_constant() -> None:
    found = judge(node("Expand", "x one"), inputs=[*X, value("one", T.INT64, [1])], one=ONE)
    assert not found.is_value_bounded


DIVISIONS = {
    "integers": ([node("Div", "i i")], True),
    "remainder": ([node("Mod", "i i")], True),
    "integer by constant": ([node("Div", "i two")], False),
    "integer by minus one": ([node("Div", "i minus")], True),
    "integer by constant zero": ([node("Mod", "i zeros")], True),
    "floats": ([node("Div", "x x")], False),
    "float remainder": ([node("Mod", "x x", fmod=1)], False),
    "integers cast to floats": ([node("Cast", "i", "f", to=T.FLOAT), node("Div", "f f")], False),
    "floats cast to integers": ([node("Cast", "x", "f", to=T.INT32), node("Div", "f f")], True),
    "shapes": ([node("Shape", "x", "s"), node("Div", "s s")], True),
    "after an operator of which no type is known": ([node("Det", "x", "d"), node("Div", "d d")], True),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_integer_division_can_trap_unless_its_divisor_is_a_harmless_constant(name: str) -> None:
    nodes, can_trap = DIVISIONS[name]
    found = judge(*nodes, two=np.array(2), minus=np.array([3, -1]), zeros=np.array([0, 1]))
    assert found.can_trap is can_trap, found.reasons


def test_an_operator_that_was_never_tried_counts_as_one_that_crashes() -> None:
    found = judge(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"))
    assert found.can_trap
    assert "com.microsoft::Gelu" in found.reasons[0]


@pytest.mark.parametrize("wraps", ["body", "function", "function in a body"])
def test_hazards_are_seen_inside_bodies_and_functions(wraps: str) -> None:
    inner = [node("Div", "i i", "q"), node("Expand", "x q", "e"), node("Identity", "e", "y")]
    opsets = [helper.make_opsetid("", 18)]
    call = helper.make_node("f", ["x", "i"], ["y"], domain="local")
    functions = [helper.make_function("local", "f", ["x", "i"], ["y"], inner, opsets)] if "function" in wraps else []
    nodes = [call] if functions else inner
    if "body" in wraps:
        body = helper.make_graph(nodes, "body", [], Y)
        nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    model = make_graph(nodes, [*X, *IDS, value("c", T.BOOL, [])], Y)
    model.functions.extend(functions)
    found = hazards_of(model)
    assert found.can_trap
    assert not found.is_value_bounded
    assert found.has_loops is ("body" in wraps)


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_loops_are_seen(kind: str) -> None:
    body = helper.make_graph(
        [node("Identity", "a", "b")], "body", [value("a", T.FLOAT, [4])], [value("b", T.FLOAT, [4])]
    )
    found = judge(helper.make_node(kind, ["x"], ["y"], body=body, **({"num_scan_inputs": 1} if kind == "Scan" else {})))
    assert found.has_loops
    assert found.is_value_bounded is (kind == "Scan")


def test_functions_that_call_each_other_twice_are_judged_at_once() -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", "f0", ["a"], ["b"], [node("Relu", "a", "b")], opsets)]
    for level in range(1, 24):
        inner = [
            helper.make_node(f"f{level - 1}", ["a"], ["m"], domain="local"),
            helper.make_node(f"f{level - 1}", ["m"], ["b"], domain="local"),
        ]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], inner, opsets))
    model = make_graph([helper.make_node("f23", ["x"], ["y"], domain="local")], X, Y)
    model.functions.extend(functions)
    started = time.monotonic()
    assert hazards_of(model) == Hazards(has_loops=False, is_value_bounded=True, can_trap=False)
    assert time.monotonic() - started < 5


def test_functions_nested_too_deep_can_do_everything() -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", "f0", ["a"], ["b"], [node("Relu", "a", "b")], opsets)]
    for level in range(1, 100):
        inner = [helper.make_node(f"f{level - 1}", ["a"], ["b"], domain="local")]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], inner, opsets))
    model = make_graph([helper.make_node("f99", ["x"], ["y"], domain="local")], X, Y)
    model.functions.extend(functions)
    found = hazards_of(model)
    assert found.can_trap
    assert found.has_loops
    assert not found.is_value_bounded


def _tree(true_id: int) -> onnx.NodeProto:
    return helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1, nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2], nodes_featureids=[0, 0, 0], nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.5, 0.0, 0.0], nodes_truenodeids=[true_id, 0, 0], nodes_falsenodeids=[2, 0, 0],
        target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[1.0, 2.0],
    )  # fmt: skip


def test_a_tree_that_runs_in_a_circle_is_not_safe() -> None:
    assert not judge(_tree(1)).can_trap
    assert judge(_tree(0)).can_trap
