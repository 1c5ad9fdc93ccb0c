"""Converts a fitted estimator to an ONNX graph over preprocessed rows, with skl2onnx. Independent of store and columns.

The graph has the input `x`, float32 [batch, width], and the outputs of a bundle's graph: `probabilities` and `class`,
`probability` (of class 1) and `class`, or `prediction`.
"""

import copy
import warnings
from typing import Any

import numpy as np
import onnx
import onnx.compose
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from skl2onnx import convert_sklearn
from skl2onnx.common._registration import get_converter
from skl2onnx.common.data_types import FloatTensorType

from maas_ray.bundle.format import MAX_GRAPH_BYTES
from maas_ray.errors import ModelError
from maas_ray.train.classical.estimator import Fitted

INPUT = "x"
OPSETS = {"": 18, "ai.onnx.ml": 3}
"""Opsets of the exported preprocessing, with which this graph is merged."""

_TIE = 2.0**20
"""Probabilities that differ by less than about 1 / _TIE count as equal: float32 sums have such differences."""


def build_graph(fitted: Fitted, width: int) -> bytes:
    """Converts an estimator; the same estimator gives the same bytes.

    Args:
        fitted: the estimator.
        width: number of features per row.

    Raises:
        ModelError: the graph exceeds the size limit.
    """
    convertible = _convertible(fitted.estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about attributes of scikit-learn that skl2onnx reads for old releases
        model: ModelProto = convert_sklearn(
            convertible,
            "model",
            [(INPUT, FloatTensorType([None, width]))],
            target_opset=OPSETS,
            options=None if fitted.task == "regression" else {"zipmap": False},
        )
    model = onnx.compose.add_prefix(model, "estimator/", rename_inputs=False)  # so that our names are unused
    nodes, constants, outputs = _head(fitted, model.graph.output[-1].name)
    graph = model.graph
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, kind, ["batch", *sizes]) for name, kind, sizes in outputs)
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    _drop_unused(graph)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in sorted(OPSETS.items()))
    if (size := model.ByteSize()) > MAX_GRAPH_BYTES:
        raise ModelError(
            f"the graph of the fitted model has {size} bytes, the limit is {MAX_GRAPH_BYTES}; limit its trees by "
            "max_depth, max_leaf_nodes or min_samples_leaf, or lower size"
        )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _head(
    fitted: Fitted, scores: str
) -> tuple[list[NodeProto], dict[str, NDArray[Any]], list[tuple[str, int, list[Any]]]]:
    """The nodes from skl2onnx's last output to ours, their constants, and our outputs (name, type, sizes).

    Of equal probabilities the first class is chosen, as in scikit-learn, whose sums have a precision of 53 bits.
    """
    if fitted.task == "regression":
        constants: dict[str, Any] = {"target_scale": np.float32(fitted.scale), "target_shift": np.float32(fitted.shift)}
        nodes = [
            helper.make_node("Mul", [scores, "target_scale"], ["target_units"]),
            helper.make_node("Add", ["target_units", "target_shift"], ["prediction"]),
        ]
        return nodes, _arrays(constants), [("prediction", TensorProto.FLOAT, [1])]
    tie: dict[str, Any] = {"tie": np.float32(_TIE)}
    if fitted.task == "classification":
        nodes = [
            helper.make_node("Identity", [scores], ["probabilities"]),
            helper.make_node("Mul", [scores, "tie"], ["class_large"]),
            helper.make_node("Round", ["class_large"], ["class_rounded"]),
            helper.make_node("ArgMax", ["class_rounded"], ["class"], axis=1, keepdims=0),
        ]
        num_classes = len(fitted.estimator.classes_)
        outputs = [("probabilities", TensorProto.FLOAT, [num_classes]), ("class", TensorProto.INT64, [])]
        return nodes, _arrays(tie), outputs
    constants = {**tie, "half": np.float32(_TIE / 2), "second": np.array([1]), "columns": np.array([1])}
    nodes = [
        helper.make_node("Gather", [scores, "second"], ["probability"], axis=1),
        helper.make_node("Mul", ["probability", "tie"], ["class_large"]),
        helper.make_node("Round", ["class_large"], ["class_rounded"]),
        helper.make_node("Greater", ["class_rounded", "half"], ["class_is_one"]),
        helper.make_node("Squeeze", ["class_is_one", "columns"], ["class_flat"]),
        helper.make_node("Cast", ["class_flat"], ["class"], to=TensorProto.INT64),
    ]
    return nodes, _arrays(constants), [("probability", TensorProto.FLOAT, [1]), ("class", TensorProto.INT64, [])]


def _arrays(constants: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(value) for name, value in constants.items()}


def _drop_unused(graph: Any) -> None:
    """Removes nodes that no output needs, such as skl2onnx's computation of the classes."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # the nodes are in topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    kept.reverse()
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)


def _convertible(estimator: Any) -> Any:
    """Returns the estimator in a form that skl2onnx 1.20 converts exactly."""
    if not hasattr(estimator, "_predictors"):
        return estimator
    # Histogram-based boosting compares float32 rows with float64 thresholds. Rounding each threshold down to a float32
    # preserves every comparison; skl2onnx rounds to the nearest one, which can exceed a row's value.
    prepared = copy.deepcopy(estimator)
    for predictor in (one for several in prepared._predictors for one in several):
        exact = predictor.nodes["num_threshold"]
        near = exact.astype(np.float32)
        predictor.nodes["num_threshold"] = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    prepared.onnx_converter = lambda: _convert_boosting
    return prepared


def _convert_boosting(scope: Any, operator: Any, container: Any) -> None:
    """Wraps skl2onnx's converter, whose booleans among integers the onnx package rejects since 1.23."""
    get_converter(operator.type)(scope, operator, _Integers(container))


class _Integers:
    """A node container that writes booleans as integers."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, *arguments: Any, **attributes: Any) -> None:
        name = "nodes_missing_value_tracks_true"
        if name in attributes:
            attributes[name] = [int(value) for value in attributes[name]]
        self._container.add_node(*arguments, **attributes)
