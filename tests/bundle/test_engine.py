"""Sessions on real graphs: values, warm-up, errors and the latency estimate."""

import math

import numpy as np
import pytest
from onnx import TensorProto, helper

from maas_ray.bundle.engine import Engine, EngineSpec
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.bundle.latency import LatencyModel
from maas_ray.errors import BadRequest, BundleError
from tests.support.onnx_models import (
    LOOKUP,
    MIXED,
    UNBATCHED,
    lookup,
    make_bundle,
    make_graph,
    mixed,
    unbatched,
    value,
)


def test_a_graph_is_run_by_input_names() -> None:
    outputs = Engine(make_bundle()).run({"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((2, 3), 2.0, np.float32))


def test_strings_and_missing_numbers_are_handled_inside_the_graph() -> None:
    colors = np.array([["red"], ["a\0b"], [""], ["grün"]], dtype=object)
    ages = np.array([[1.0], [np.nan], [3.0], [4.0]], np.float32)
    outputs = Engine(make_bundle(mixed(), MIXED)).run({"color": colors, "age": ages})
    assert outputs["code"].ravel().tolist() == [1, -1, 0, -1]
    assert outputs["shown"].ravel().tolist() == [1.0, 30.0, 3.0, 4.0]
    assert outputs["echo"].tolist() == colors.tolist()


def test_values_that_the_graph_refuses_are_the_callers_fault() -> None:
    engine = Engine(make_bundle(lookup(), LOOKUP))
    with pytest.raises(BadRequest, match="refuses these values"):
        engine.run({"index": np.array([[99]], np.int64)})
    assert engine.run({"index": np.array([[4]], np.int64)})["y"].tolist() == [[40.0]]


def test_a_graph_without_a_batch_dimension_is_run_as_it_is() -> None:
    assert Engine(make_bundle(unbatched(), UNBATCHED)).run({"v": np.ones(4, np.float32)})["total"].tolist() == [4.0]


def test_warm_up_seeds_the_estimate_for_every_size_asked_for() -> None:
    engine = Engine(make_bundle(), EngineSpec(warmup_rows=(1, 16)))
    assert 0 < engine.latency.estimate_s(1) < 1
    assert 0 < engine.latency.estimate_s(16) < 1


def test_a_graph_that_fails_on_blank_rows_is_not_served() -> None:
    graph = make_graph(
        [helper.make_node("Reshape", ["x", "impossible"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 7])],
        {"impossible": np.array([-1, 7], np.int64)},
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 7)),),
    )
    with pytest.raises(BundleError, match="fails its warm-up run"):
        Engine(make_bundle(graph.SerializeToString(), signature))


def test_a_graph_that_computes_over_the_batch_dimension_is_never_merged() -> None:
    def softmax(axis: int) -> Engine:
        graph = make_graph(
            [helper.make_node("Softmax", ["x"], ["y"], axis=axis)],
            [value("x", TensorProto.FLOAT, ["n", 3])],
            [value("y", TensorProto.FLOAT, ["n", 3])],
        )
        return Engine(make_bundle(graph.SerializeToString()))

    assert softmax(axis=1).can_merge
    assert not softmax(axis=0).can_merge
    assert not Engine(make_bundle(unbatched(), UNBATCHED)).can_merge


@pytest.mark.parametrize(("graph", "signature"), [(mixed(), MIXED), (lookup(), LOOKUP)])
def test_graphs_over_strings_and_tables_are_merged(graph: bytes, signature: Signature) -> None:
    assert Engine(make_bundle(graph, signature)).can_merge


def test_the_estimate_follows_what_is_measured() -> None:
    timing = LatencyModel()
    assert timing.estimate_s(1) == math.inf
    timing.record(8, 0.1)
    assert timing.estimate_s(8) == 0.1
    assert timing.estimate_s(1) == 0.1, "a run has a fixed cost, so fewer rows are not assumed to be faster"
    assert timing.estimate_s(32) == pytest.approx(0.4), "more rows are assumed to take longer in proportion"
    for _ in range(100):
        timing.record(8, 0.2)
    assert timing.estimate_s(8) == pytest.approx(0.2, rel=1e-3)
