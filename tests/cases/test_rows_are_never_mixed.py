"""One probe with blank integers decided whether requests share a run: a mean over the batch and a running sum mixed
them.

Requests now share a run only along a declared batch dimension, in a graph that was found to keep rows separate.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from maas_ray.bundle.format import Bundle, Signature
from maas_ray.bundle.graph.checks import signature_of
from maas_ray.serve.wire.classification import classify
from tests.support.infer_bodies import read_infer
from tests.support.onnx_models import make_graph, make_info, value
from tests.support.together import ask_together, load

Node = helper.make_node
INT64, FLOAT, STRING = TensorProto.INT64, TensorProto.FLOAT, TensorProto.STRING


def bundle_of(model: onnx.ModelProto) -> Bundle:
    graph = model.SerializeToString()
    return Bundle("test", make_info(signature_of(graph)), graph)


def mean_over_the_batch(name: str = "N") -> onnx.ModelProto:
    return make_graph(
        [
            Node("Cast", ["x"], ["f"], to=FLOAT),
            Node("ReduceMean", ["f", "ax"], ["m"], keepdims=1),
            Node("Sub", ["f", "m"], ["y"]),
        ],
        [value("x", INT64, [name, 1])],
        [value("y", FLOAT, [name, 1])],
        {"ax": np.array([0], np.int64)},
    )


def running_sum() -> onnx.ModelProto:
    return make_graph(
        [Node("CumSum", ["x", "ax"], ["y"])],
        [value("x", INT64, ["n"])],
        [value("y", INT64, ["n"])],
        {"ax": np.array(0)},
    )


def mean_of_words() -> onnx.ModelProto:
    """A text model without a batch: every word's vector, less the mean of all of them."""
    return make_graph(
        [
            Node("Gather", ["table", "ids"], ["words"]),
            Node("ReduceMean", ["words", "ax"], ["mean"], keepdims=1),
            Node("Sub", ["words", "mean"], ["y"]),
        ],
        [value("ids", INT64, ["seq"])],
        [value("y", FLOAT, ["seq", 4])],
        {"table": np.arange(40, dtype=np.float32).reshape(10, 4) ** 2, "ax": np.array([0], np.int64)},
    )


@pytest.mark.parametrize("name", ["N", "batch"])
def test_a_mean_over_the_batch_is_computed_for_each_request_alone(name: str) -> None:
    engine = load(bundle_of(mean_over_the_batch(name)))
    assert "ReduceMean" in engine.not_merged_because
    answers, counted = ask_together(engine, [{"x": np.array([[n]], np.int64)} for n in range(50)])
    assert [answer["y"].tolist() for answer in answers] == [[[0.0]]] * 50
    assert counted.runs == [1] * 50


def test_a_running_sum_is_computed_for_each_request_alone() -> None:
    engine = load(bundle_of(running_sum()))
    assert "CumSum" in engine.not_merged_because
    requests = [{"x": np.array([1, 2, 3] if n % 2 else [10, 20], np.int64)} for n in range(50)]
    answers, _ = ask_together(engine, requests)
    assert [answer["y"].tolist() for answer in answers] == [[1, 3, 6] if n % 2 else [10, 30] for n in range(50)]


def test_a_text_model_without_a_batch_is_computed_for_each_request_alone() -> None:
    engine = load(bundle_of(mean_of_words()))
    assert not engine.signature.is_batched
    requests = [{"ids": np.array([n % 10, n % 3], np.int64)} for n in range(30)]
    answers, _ = ask_together(engine, requests)
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer["y"], engine.run(request)["y"])


@pytest.mark.parametrize("size", ["batch", "batch_size", "B", "N", "n", "", "unk__7", "rows"])
def test_a_first_dimension_is_the_batch_by_its_name_and_its_graph(size: str) -> None:
    shape = [size or None, 3]
    model = make_graph([Node("Relu", ["x"], ["y"])], [value("x", FLOAT, shape)], [value("y", FLOAT, shape)])
    engine = load(bundle_of(model))
    assert engine.signature.is_batched
    assert engine.can_merge
    _, counted = ask_together(engine, [{"x": np.ones((1, 3), np.float32)}] * 20)
    assert counted.runs == [20]


@pytest.mark.parametrize("size", ["seq", "num_points", "length", "tokens", "time", "T", "height"])
def test_a_first_dimension_of_another_name_is_none(size: str) -> None:
    model = make_graph([Node("Relu", ["x"], ["y"])], [value("x", FLOAT, [size, 3])], [value("y", FLOAT, [size, 3])])
    engine = load(bundle_of(model))
    assert not engine.signature.is_batched
    assert f"--batch-axis {size}" in engine.not_merged_because


def served(model: onnx.ModelProto) -> Signature:
    return load(bundle_of(model)).signature


def body(**inputs: tuple[str, list[int], list[float]]) -> bytes:
    tensors = (
        f'{{"name":"{name}","datatype":"{kind}","shape":{shape},"data":{data}}}'
        for name, (kind, shape, data) in inputs.items()
    )
    return f'{{"inputs":[{",".join(tensors)}]}}'.encode()


def test_inputs_of_different_lengths_are_accepted_without_a_batch_dimension() -> None:
    model = make_graph(
        [
            Node("Transpose", ["centers"], ["turned"], perm=[1, 0]),
            Node("MatMul", ["points", "turned"], ["y"]),
        ],
        [value("points", FLOAT, ["num_points", 2]), value("centers", FLOAT, ["num_centers", 2])],
        [value("y", FLOAT, ["num_points", "num_centers"])],
    )
    signature = served(model)
    assert not signature.is_batched
    request = read_infer(body(points=("FP32", [3, 2], [1.0] * 6), centers=("FP32", [1, 2], [1.0] * 2)), signature)
    assert request.inputs["points"].shape == (3, 2)
    assert request.num_rows == 1


def test_a_length_of_zero_is_accepted_without_a_batch_dimension() -> None:
    signature = served(running_sum())
    assert read_infer(body(x=("INT64", [0], [])), signature).inputs["x"].shape == (0,)


def test_without_a_batch_dimension_classes_are_those_of_the_whole_tensor() -> None:
    model = make_graph(
        [Node("Softmax", ["scores"], ["y"], axis=0)],
        [value("scores", FLOAT, ["num_words"])],
        [value("y", FLOAT, ["num_words"])],
    )
    engine = load(bundle_of(model))
    scores = engine.run({"scores": np.array([1.0, 3.0, 2.0], np.float32)})["y"]
    found = classify(scores, 2, None, is_batched=engine.signature.is_batched)
    assert [text.split(":")[1] for text in found] == ["1", "2"]


def image_model() -> onnx.ModelProto:
    """A convolution and three halvings, which refuse images smaller than 8 by 8, and a mean over each image."""
    halved = [Node("MaxPool", [f"h{n}"], [f"h{n + 1}"], kernel_shape=[2, 2], strides=[2, 2]) for n in range(3)]
    return make_graph(
        [
            Node("Conv", ["x", "w"], ["h0"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            *halved,
            Node("GlobalAveragePool", ["h3"], ["mean"]),
            Node("Flatten", ["mean"], ["y"]),
        ],
        [value("x", FLOAT, ["batch", 3, "height", "width"])],
        [value("y", FLOAT, ["batch", 4])],
        {"w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)},
    )


def test_image_models_of_free_height_and_width_share_runs() -> None:
    engine = load(bundle_of(image_model()))
    assert engine.can_merge, engine.not_merged_because
    random = np.random.default_rng(1)
    sides = [16, 24]
    requests = [{"x": random.random((1, 3, sides[n % 2], 16)).astype(np.float32)} for n in range(20)]
    answers, counted = ask_together(engine, requests)
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer["y"], engine.run(request)["y"], rtol=1e-5)
    assert counted.runs == [10, 10]
