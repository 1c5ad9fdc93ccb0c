import time

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from maas_ray.bundle.graph.extent import MAX_ENDS, MAX_NODES, check_extent, count_nodes
from maas_ray.errors import BundleError
from tests.support.onnx_models import make_graph, value


def doubling(levels: int, shared: bool = True) -> onnx.ModelProto:
    """Functions of which each calls the one before twice."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    relu = [helper.make_node("Relu", ["a"], ["m"]), helper.make_node("Relu", ["m"], ["b"])]
    functions = [helper.make_function("local", "f0", ["a"], ["b"], relu, opsets)]
    for level in range(1, levels):
        name = f"f{level - 1}"
        inner = [
            helper.make_node(name, ["a"], ["m"], domain="local"),
            helper.make_node(name, ["m"], ["b"], domain="local"),
        ]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], inner, opsets))
    call = helper.make_node(f"f{levels - 1}", ["x"], ["y"], domain="local")
    model = make_graph([call], [value("x", T.FLOAT, ["n", 3])], [value("y", T.FLOAT, ["n", 3])])
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.extend(reversed(functions))  # callers before callees
    return model


@pytest.mark.parametrize("levels", [1, 2, 10, 60])
def test_nodes_are_counted_as_if_functions_were_put_in_place(levels: int) -> None:
    started = time.monotonic()
    assert count_nodes(doubling(levels)) == 2**levels
    assert time.monotonic() - started < 5


def test_doubling_functions_are_refused_and_a_few_are_not() -> None:
    check_extent(doubling(10))
    with pytest.raises(BundleError, match=f"{2**24} nodes"):
        check_extent(doubling(24))


def test_nodes_of_bodies_count() -> None:
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["m"]), helper.make_node("Relu", ["m"], ["o"])],
        "body", [], [value("o", T.FLOAT, ["n"])],
    )  # fmt: skip
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    tail = helper.make_node("Relu", ["y"], ["z"])
    model = make_graph(
        [branch, tail], [value("x", T.FLOAT, ["n"]), value("c", T.BOOL, [])], [value("z", T.FLOAT, ["n"])]
    )
    assert count_nodes(model) == 6


def test_long_chains_and_many_inputs_are_refused() -> None:
    chain = [helper.make_node("Relu", [f"x{i}"], [f"x{i + 1}"]) for i in range(MAX_NODES + 1)]
    model = make_graph(chain, [value("x0", T.FLOAT, ["n"])], [value(f"x{MAX_NODES + 1}", T.FLOAT, ["n"])])
    with pytest.raises(BundleError, match=f"{MAX_NODES + 1} nodes"):
        check_extent(model)
    wide = make_graph(
        [helper.make_node("Sum", [f"x{i}" for i in range(MAX_ENDS)], ["y"])],
        [value(f"x{i}", T.FLOAT, ["n"]) for i in range(MAX_ENDS)],
        [value("y", T.FLOAT, ["n"])],
    )
    with pytest.raises(BundleError, match=f"{MAX_ENDS + 1} inputs and outputs"):
        check_extent(wide)
