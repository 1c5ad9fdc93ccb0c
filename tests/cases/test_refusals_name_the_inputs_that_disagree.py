""" "the model refuses these values" named no input, though the graph names the sizes that its inputs share."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.bundle.graph.named_sizes import disagreement
from maas_ray.errors import BadRequest
from tests.support.onnx_models import LOOKUP, lookup, make_bundle, make_graph, value


def test_inputs_that_disagree_on_a_shared_size_are_named() -> None:
    graph = make_graph(
        [helper.make_node("Add", ["ids", "mask"], ["out"])],
        [value("ids", TensorProto.FLOAT, ["n", "seq"]), value("mask", TensorProto.FLOAT, ["n", "seq"])],
        [value("out", TensorProto.FLOAT, ["n", "seq"])],
    ).SerializeToString()
    free = {name: TensorSpec(name=name, datatype="FP32", shape=(-1, -1)) for name in ("ids", "mask", "out")}
    engine = Engine(make_bundle(graph, Signature(inputs=(free["ids"], free["mask"]), outputs=(free["out"],))))
    with pytest.raises(BadRequest) as refused:
        engine.run({"ids": np.zeros((2, 4), np.float32), "mask": np.zeros((2, 3), np.float32)})
    assert "inputs 'ids' (axis 1) and 'mask' (axis 1) share the size 'seq', but have 4 and 3" in str(refused.value)
    engine.close()


def test_other_refusals_name_none() -> None:
    engine = Engine(make_bundle(lookup(), LOOKUP))
    with pytest.raises(BadRequest, match="compare shapes and values with the model's metadata"):
        engine.run({"index": np.array([[7]])})
    engine.close()


@pytest.mark.parametrize(
    ("declared", "shapes", "found"),
    [
        ({"a": ["n", 3], "b": ["n", 4]}, {"a": (2, 3), "b": (2, 4)}, ""),
        ({"a": ["n"], "b": ["n"]}, {"a": (2,), "b": (5,)}, "have 2 and 5"),
        ({"a": [None], "b": [None]}, {"a": (2,), "b": (5,)}, ""),
        ({"a": ["n"], "b": ["n"]}, {"b": (5,)}, ""),
        ({"a": ["n", "n"]}, {"a": (2, 3)}, "'a' (axis 0) and 'a' (axis 1)"),
    ],
)
def test_sizes_are_compared_by_name(
    declared: dict[str, list[int | str | None]], shapes: dict[str, tuple[int, ...]], found: str
) -> None:
    text = disagreement(declared, {name: np.zeros(shape) for name, shape in shapes.items()})
    assert found in text
    assert bool(text) == bool(found)
