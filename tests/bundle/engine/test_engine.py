"""Sessions on real graphs: values, warm-up, errors and the latency estimate."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from maas_ray.bundle import bfloat16
from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.engine.providers import CPU, CUDA, TENSORRT, choose_providers
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BadRequest, EngineFailed
from tests.support.onnx_models import (
    LINEAR,
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

FREE = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),), outputs=LINEAR.outputs)


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
    with pytest.raises(BadRequest, match="rejects these values"):
        engine.run({"index": np.array([[99]], np.int64)})
    assert engine.run({"index": np.array([[4]], np.int64)})["y"].tolist() == [[40.0]]


def test_a_graph_without_a_batch_dimension_is_run_unchanged() -> None:
    assert Engine(make_bundle(unbatched(), UNBATCHED)).run({"v": np.ones(4, np.float32)})["total"].tolist() == [4.0]


def test_warm_up_seeds_the_estimate_for_every_size_asked_for() -> None:
    engine = Engine(make_bundle(), EngineSpec(warmup_rows=(1, 16)))
    assert 0 < engine.latency.estimate_s(1) < 1
    assert 0 < engine.latency.estimate_s(16) < 1


def test_a_graph_that_refuses_all_values_that_are_made_up_has_no_warm_up() -> None:
    graph = make_graph(
        [helper.make_node("Reshape", ["x", "impossible"], ["y"])],
        [value("x", TensorProto.FLOAT, ["batch", 3])],
        [value("y", TensorProto.FLOAT, ["batch", 7])],
        {"impossible": np.array([-1, 7], np.int64)},
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 7)),),
    )
    engine = Engine(make_bundle(graph.SerializeToString(), signature))
    assert engine.warmed_with == ""
    with pytest.raises(BadRequest):
        engine.run({"x": np.ones((1, 3), np.float32)})
    assert engine.run({"x": np.ones((7, 3), np.float32)})["y"].shape == (3, 7)


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


def test_sizes_that_do_not_fit_together_are_the_callers_fault() -> None:
    graph = make_graph(
        [helper.make_node("Add", ["x", "z"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", "k"]), value("z", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", "q"])],
    )
    shape = (-1, -1)
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=shape), TensorSpec(name="z", datatype="FP32", shape=shape)),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=shape),),
    )
    engine = Engine(make_bundle(graph.SerializeToString(), signature))
    with pytest.raises(BadRequest, match="rejects these values"):
        engine.run({"x": np.ones((2, 3), np.float32), "z": np.ones((2, 4), np.float32)})
    assert engine.run({"x": np.ones((2, 3), np.float32), "z": np.ones((2, 3), np.float32)})["y"].shape == (2, 3)


@pytest.mark.parametrize(
    "message",
    [
        "Non-zero status code returned while running Add node. Status Message: Failed to allocate memory for 9 bytes",
        "Non-zero status code returned while running Conv node. Status Message: CUDNN failure 4",
        "something else altogether",
    ],
)
def test_missing_resources_are_not_reported_as_a_bad_request(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError(message)

    engine = Engine(make_bundle())
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", broken)
    with pytest.raises(EngineFailed, match="see the replica's log for the cause") as failed:
        engine.run({"x": np.ones((1, 3), np.float32)})
    assert str(failed.value.__cause__) == message


def test_bfloat16_is_passed_as_bits() -> None:
    graph = make_graph(
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "z"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.BFLOAT16),
        ],
        [value("x", TensorProto.BFLOAT16, ["n", 2]), value("z", TensorProto.FLOAT, ["n", 2])],
        [value("y", TensorProto.BFLOAT16, ["n", 2]), value("sum", TensorProto.FLOAT, ["n", 2])],
    )
    tensors = {
        name: TensorSpec(name=name, datatype=kind, shape=(-1, 2))
        for name, kind in (("x", "BF16"), ("z", "FP32"), ("y", "BF16"), ("sum", "FP32"))
    }
    signature = Signature(inputs=(tensors["x"], tensors["z"]), outputs=(tensors["y"], tensors["sum"]))
    engine = Engine(make_bundle(graph.SerializeToString(), signature))
    assert engine.can_merge
    numbers = np.array([[1.0, -2.5], [0.0, 3e38]], np.float32)
    outputs = engine.run({"x": bfloat16.from_float32(numbers), "z": np.ones((2, 2), np.float32)})
    assert outputs["y"].dtype == np.uint16
    np.testing.assert_allclose(bfloat16.to_float32(outputs["y"]), numbers + 1, rtol=2**-7)  # type: ignore[arg-type]
    np.testing.assert_allclose(outputs["sum"], numbers + 1, rtol=2**-7)
    nothing = engine.run({"x": np.empty((0, 2), np.uint16), "z": np.empty((0, 2), np.float32)})
    assert nothing["y"].shape == (0, 2)


def test_graphs_and_streams_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="set instances to 1"):
        EngineSpec(cuda_graph_rows=(4,), instances=2)


def test_without_a_gpu_the_option_of_cuda_graphs_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(make_bundle(), EngineSpec(cuda_graph_rows=(4,)))
    assert "no CUDA graphs, because the graph runs on CPUExecutionProvider" in caplog.text
    np.testing.assert_array_equal(engine.run({"x": np.ones((3, 3), np.float32)})["y"], np.full((3, 3), 2, np.float32))


ALL = (TENSORRT, CUDA, CPU)


@pytest.mark.parametrize(
    ("gpus", "available", "signature", "use_cuda_graph", "expected", "reason"),
    [
        (0.0, ALL, LINEAR, False, [CPU], "the replica has no GPU"),
        (1.0, ALL, LINEAR, False, [TENSORRT, CUDA, CPU], "has 1 GPUs"),
        (0.5, (CUDA, CPU), LINEAR, False, [CUDA, CPU], "this build does not have it"),
        (1.0, (CPU,), LINEAR, False, [CPU], "this build does not have it"),
        (1.0, ALL, LINEAR, True, [CUDA, CPU], "captured as CUDA graphs"),
        (1.0, ALL, FREE, False, [CUDA, CPU], "sizes other than the number of rows vary"),
    ],
)
def test_providers_are_chosen_by_availability_with_a_reason(
    gpus: float,
    available: tuple[str, ...],
    signature: Signature,
    use_cuda_graph: bool,
    expected: list[str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    chosen = choose_providers(gpus, available, signature, 64, use_cuda_graph)
    assert [name for name, _ in chosen] == expected
    assert reason in caplog.text
    options = dict(chosen)
    if TENSORRT in options:
        assert options[TENSORRT]["trt_profile_max_shapes"] == "x:64x3"
    if CUDA in options:
        assert ("enable_cuda_graph" in options[CUDA]) == use_cuda_graph
