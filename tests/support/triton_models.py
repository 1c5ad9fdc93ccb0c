"""The models of Triton's quick start (docs/examples/model_repository there) as ONNX graphs of the same signatures."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper

from tests.support.onnx_models import make_graph, value

IMAGE = (3, 224, 224)
NUM_CLASSES = 1000


def simple(kind: int = T.INT32) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1, rows of 16."""
    nodes = [
        helper.make_node("Cast", ["INPUT0"], ["a"], to=T.INT32),
        helper.make_node("Cast", ["INPUT1"], ["b"], to=T.INT32),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
        helper.make_node("Cast", ["sum"], ["OUTPUT0"], to=kind),
        helper.make_node("Cast", ["difference"], ["OUTPUT1"], to=kind),
    ]
    inputs = [value(name, kind, ["batch", 16]) for name in ("INPUT0", "INPUT1")]
    return make_graph(nodes, inputs, [value(name, kind, ["batch", 16]) for name in ("OUTPUT0", "OUTPUT1")])


def simple_identity() -> onnx.ModelProto:
    """OUTPUT0 = INPUT0, rows of any number of strings."""
    return _identity(T.STRING)


def custom_identity_int32() -> onnx.ModelProto:
    """OUTPUT0 = INPUT0, rows of any number of integers."""
    return _identity(T.INT32)


def densenet_onnx() -> onnx.ModelProto:
    """Scores of an image, without a batch dimension as in the original."""
    return _scores("data_0", "fc6_1", [*IMAGE], [NUM_CLASSES])


def inception_graphdef() -> onnx.ModelProto:
    """Scores of batches of images with their channels last."""
    return _scores("input", "InceptionV3/Predictions/Softmax", ["batch", 299, 299, 3], ["batch", 1001])


def preprocess_inception_ensemble() -> onnx.ModelProto:
    """Scores of batches of encoded images. Nothing in ONNX decodes them: they are only compared with a text here."""
    nodes = [
        helper.make_node(
            "LabelEncoder", ["INPUT"], ["number"], domain="ai.onnx.ml", keys_strings=["text"], values_floats=[1.0]
        ),
        helper.make_node("Add", ["number", "scores"], ["OUTPUT"]),
    ]
    weights = {"scores": np.arange(1001, dtype=np.float32)}
    return make_graph(
        nodes, [value("INPUT", T.STRING, ["batch", 1])], [value("OUTPUT", T.FLOAT, ["batch", 1001])], weights
    )


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "simple": simple,
    "simple_int8": lambda: simple(T.INT8),
    "simple_string": lambda: simple(T.STRING),
    "simple_identity": simple_identity,
    "densenet_onnx": densenet_onnx,
    "inception_graphdef": inception_graphdef,
    "preprocess_inception_ensemble": preprocess_inception_ensemble,
    "custom_identity_int32": custom_identity_int32,
}

LABELS = {
    "densenet_onnx": tuple(f"CLASS {number}" for number in range(NUM_CLASSES)),
    "inception_graphdef": tuple(f"class {number}" for number in range(1001)),
    "preprocess_inception_ensemble": tuple(f"class {number}" for number in range(1001)),
}


def _identity(kind: int) -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])],
        [value("INPUT0", kind, ["batch", "n"])],
        [value("OUTPUT0", kind, ["batch", "n"])],
    )


def _scores(name: str, output: str, image: list[int | str], scores: list[int | str]) -> onnx.ModelProto:
    """Means of the pixels, plus a ramp that orders the classes."""
    width = scores[-1]
    assert isinstance(width, int)
    axes = [axis for axis in range(len(image)) if not (axis == 0 and image[0] == "batch")]
    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["means"]),
        helper.make_node("Add", ["means", "ramp"], ["rows"]),
        helper.make_node("Reshape", ["rows", "shape"], [output]),
    ]
    weights = {
        "axes": np.array(axes),
        "column": np.array([-1, 1]),
        "ramp": np.linspace(0, 1, width, dtype=np.float32),
        "shape": np.array([width] if len(scores) == 1 else [-1, width]),
    }
    return make_graph(nodes, [value(name, T.FLOAT, image)], [value(output, T.FLOAT, scores)], weights)
