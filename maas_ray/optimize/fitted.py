"""Joins a fitted classical model's graph with its preprocessing, and verifies the result. Independent of stores."""

from typing import Any

import numpy as np
import onnx
import onnx.compose
from torch import Tensor, nn

from maas_ray.bundle.format import Signature
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.features import Features
from maas_ray.export.onnx_export import build_signature, seal_graph, trace
from maas_ray.export.parity import ParitySpec, ReferenceOutputs, check_reference
from maas_ray.train.classical.state import FittedState


class _Flat(nn.Module):
    """Preprocessing to one vector per row, the input of classical models."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.preprocess = Preprocess(features)

    def forward(self, *columns: Tensor) -> Tensor:
        row: Tensor = self.preprocess(*columns)
        return row.flatten(1)


def export_fitted(
    fitted: FittedState, features: Features, parity: ParitySpec | None = None
) -> tuple[bytes, Signature, dict[str, Any]]:
    """Puts the preprocessing before a fitted model's graph, and compares the result with scikit-learn's outputs.

    Args:
        fitted: a committed result, with reference outputs computed at training.
        features: the fitted features.
        parity: the gate's tolerances and batch sizes; the rows are those of the reference outputs.

    Returns:
        The serialized graph over raw columns, its signature, and the gate's report (see `check_parity`).

    Raises:
        GateError: the graph's results differ from the estimator's.
        BundleError: the columns' names are not valid as names of a graph's inputs.
    """
    signature = build_signature(features)
    graph = seal_graph(_join(fitted.graph, features), signature, features)
    report = check_reference(_reference(fitted, signature), features, graph, parity)
    return graph, signature, report | {"versions": {**fitted.versions, **report["versions"]}}


def _join(graph: bytes, features: Features) -> onnx.ModelProto:
    before, after = trace(_Flat(features).eval(), "the preprocessing", features), onnx.load_from_string(graph)
    after.ir_version = before.ir_version  # the newer one; it changes nothing that skl2onnx writes
    rows = before.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*after.graph.input, *after.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = rows
    for model in (before, after):
        del model.metadata_props[:]
    joint = [(before.graph.output[0].name, after.graph.input[0].name)]
    return onnx.compose.merge_models(before, after, joint, prefix1="preprocess/", prefix2="model/")


def _reference(fitted: FittedState, signature: Signature) -> ReferenceOutputs:
    proof = fitted.proof
    answers = [proof.scores.astype(np.float32), *([] if proof.classes is None else [proof.classes])]
    names = [output.name for output in signature.outputs]
    return ReferenceOutputs("scikit-learn", proof.columns, proof.num_real, dict(zip(names, answers, strict=True)))
