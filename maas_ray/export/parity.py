"""The parity gate: checks that an exported graph computes the trained model's outputs. Independent of stores."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from maas_ray.arrays import Array
from maas_ray.bundle.format import Signature
from maas_ray.bundle.sessions import cpu_session
from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.loading.raw_model import RawModel
from maas_ray.data.loading.target_units import TargetUnits
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.random_rows import draw_rows, spread_rows
from maas_ray.errors import GateError
from maas_ray.export.comparison import Comparison
from maas_ray.export.obstacles import describe_failure
from maas_ray.export.onnx_export import TRACED_ROWS, build_served, build_signature
from maas_ray.export.row_mixing import explain_differences
from maas_ray.spec import Spec

_ORT_TYPES = {
    "FP32": "tensor(float)",
    "FP64": "tensor(double)",
    "UINT8": "tensor(uint8)",
    "INT64": "tensor(int64)",
    "BYTES": "tensor(string)",
}


class ParitySpec(Spec):
    """The tolerances between the graph and the module, and the rows on which they are compared.

    A value passes if `|graph - module| <= atol * unit + rtol * |module|`. The unit is 1 for probabilities, and the
    root mean square of the module's own values for a regression, whose target has any scale. The defaults allow
    only for another order of float32 sums.
    """

    atol: float = Field(default=1e-5, ge=0.0)
    """Absolute tolerance, in units of the output."""
    rtol: float = Field(default=1e-4, ge=0.0)
    """Tolerance relative to the module's value."""
    batch_sizes: tuple[int, ...] = Field(default=(1, 3, 17, 64), min_length=1)
    """Rows per run of the graph; all rows are run at each size. The size of the traced example (2) is not allowed."""
    num_random: int = Field(default=128, ge=2)
    """Number of random rows, drawn from the description of the features; more if a column has many categories."""
    num_real: int = Field(default=256, ge=0)
    """Maximum number of real rows, evenly spread over the given rows."""
    seed: int = 0
    """Seed of the random rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.batch_sizes) < 1 or TRACED_ROWS in self.batch_sizes:
            raise ValueError(
                f"batch_sizes must be positive and must not contain {TRACED_ROWS}, the size of the traced example; "
                f"got {list(self.batch_sizes)}"
            )
        return self


@dataclass(frozen=True)
class ReferenceOutputs:
    """A trained model's outputs for some rows, which the graph must reproduce."""

    source: str
    """Library that computed them (`torch`, `scikit-learn`), for messages."""
    rows: Sequence[Array]
    """Raw columns in the order of the features."""
    num_real: int
    """Number of real rows, which are the first ones; the others are random."""
    outputs: dict[str, Array]
    """By the names of the signature, each [N, ...] in the graph's type."""


def check_parity(
    net: nn.Module,
    features: Features,
    graph: bytes,
    rows: Sequence[Array],
    spec: ParitySpec | None = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Compares the graph in onnxruntime, on raw rows, with the module in torch, on encoded rows.

    Args:
        net: the trained module; it is not changed.
        features: the fitted features.
        graph: the serialized ONNX model.
        rows: real raw columns in the order of the features, as `Dataset.read` returns them; may have no rows.
        spec: tolerances and rows; the defaults of ParitySpec if None.
        threshold: binary: the decision threshold of the graph.

    Returns:
        A JSON-able report: `passed` (true), `max_abs_error`, `max_rel_error` (relative to the value, or to the
        absolute tolerance if that is larger), `top1_agreement` (fraction of rows with the same class; None for a
        regression), `outputs` (both errors of each), `batch_sizes`, `num_rows`, `num_real`, `num_random`,
        `tolerance`, `versions`.

    Raises:
        GateError: the graph cannot be loaded or run, its inputs or outputs differ from the signature, it has a fixed
            number of rows, or it exceeds the tolerance; the message names output, batch size, row, value and limit.
            If the module mixes the rows of a batch or is not deterministic, the message says where.
    """
    spec = spec or ParitySpec()
    real = spread_rows(rows, spec.num_real)
    random = draw_rows(features, spec.num_random, spec.seed)
    raw = [np.concatenate(pair) for pair in zip(real, random, strict=True)]
    served, name = _reference_of(net, features, threshold), type(net).__name__
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in encode_columns(features, raw)]
    outputs = _run_module(served, features, columns, max(spec.batch_sizes), name)
    reference = ReferenceOutputs("torch", raw, len(real[0]), outputs)
    try:
        report = check_reference(reference, features, graph, spec, threshold)
    except GateError as error:
        if (reason := explain_differences(served, columns, name)) is not None:
            raise GateError(f"{reason} ({str(error).partition('. ')[0]})") from error
        raise
    return report | {"versions": {"torch": torch.__version__, **report["versions"]}}


def check_reference(
    reference: ReferenceOutputs,
    features: Features,
    graph: bytes,
    spec: ParitySpec | None = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Compares the graph in onnxruntime with the trained model's outputs for the same raw rows.

    Args:
        reference: rows and outputs of the trained model.
        features: the fitted features.
        graph: the serialized ONNX model.
        spec: tolerances and batch sizes; the defaults of ParitySpec if None.
        threshold: binary: the decision threshold of the graph.

    Returns:
        See `check_parity`.

    Raises:
        GateError: see `check_parity`.
    """
    spec = spec or ParitySpec()
    signature = build_signature(features)
    session = _load(graph)
    _check_interface(session, signature)
    comparison = Comparison(
        signature,
        reference.outputs,
        reference.num_real,
        atol=spec.atol,
        rtol=spec.rtol,
        source=reference.source,
        threshold=threshold,
    )
    for batch_size in spec.batch_sizes:
        comparison.check(_run_graph(session, signature, reference.rows, batch_size), batch_size)
    num_rows = len(reference.rows[0])
    return comparison.report() | {
        "batch_sizes": list(spec.batch_sizes),
        "num_rows": num_rows,
        "num_real": reference.num_real,
        "num_random": num_rows - reference.num_real,
        "tolerance": {"atol": spec.atol, "rtol": spec.rtol},
        "versions": _versions(graph),
    }


def _load(graph: bytes) -> onnxruntime.InferenceSession:
    try:
        return cpu_session(graph, 1)
    except Exception as error:
        raise GateError(f"onnxruntime cannot load the exported graph: {error}") from error


def _check_interface(session: onnxruntime.InferenceSession, signature: Signature) -> None:
    pairs = (("inputs", session.get_inputs(), signature.inputs), ("outputs", session.get_outputs(), signature.outputs))
    for kind, found, expected in pairs:
        got = [
            (value.name, value.type, [size if isinstance(size, int) else -1 for size in value.shape]) for value in found
        ]
        wanted = [(value.name, _ORT_TYPES[value.datatype], list(value.shape)) for value in expected]
        for name, _, shape in got:
            if shape and shape[0] != -1:
                raise GateError(
                    f"the graph has a fixed number of {shape[0]} row(s): {name!r} of its {kind} has the shape {shape}"
                )
        if got != wanted:
            raise GateError(f"the {kind} of the graph are {got}; the signature declares {wanted}")


def _reference_of(net: nn.Module, features: Features, threshold: float) -> nn.Module:
    """The module over encoded columns whose outputs the graph must reproduce."""
    if features.task != "regression":
        return build_served(net, features, threshold)
    # As evaluation computes predictions, so that a graph in other units than those of the metrics is noticed.
    return _Predictions(copy.deepcopy(net).cpu(), features).eval()


class _Predictions(nn.Module):
    def __init__(self, net: nn.Module, features: Features) -> None:
        super().__init__()
        self._model, self._units = RawModel(features, net), TargetUnits(features.target_scaling)

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        return (self._units(self._model(*columns)),)


def _run_module(
    served: nn.Module, features: Features, columns: Sequence[Tensor], batch_size: int, name: str
) -> dict[str, Array]:
    parts = []
    with torch.no_grad():
        for start in range(0, len(columns[0]), batch_size):
            try:
                parts.append(served(*(column[start : start + batch_size] for column in columns)))
            except Exception as error:  # a user's code may raise anything
                raise GateError(
                    f"the model {name} fails on some of the rows of the parity gate, which contain missing values, unknown "
                    f"categories and extreme numbers: {describe_failure(error)}; callers of an endpoint send such rows too "
                    "(an embedding needs data.cleaning.categorical.unknown: code)"
                ) from error
    names = [output.name for output in build_signature(features).outputs]
    return {name: torch.cat(values).numpy() for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def _run_graph(
    session: onnxruntime.InferenceSession, signature: Signature, raw: Sequence[Array], batch_size: int
) -> dict[str, Array]:
    """Runs all rows in batches of exactly `batch_size`; the last batch is filled with the first rows."""
    num_rows, names = len(raw[0]), [output.name for output in signature.outputs]
    places = np.arange(ceil(num_rows / batch_size) * batch_size) % num_rows
    parts = []
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        feed = {value.name: column[chosen] for value, column in zip(signature.inputs, raw, strict=True)}
        try:
            parts.append(session.run(names, feed))
        except Exception as error:  # onnxruntime's exceptions share no base below Exception
            raise GateError(f"the graph cannot be run with {batch_size} row(s): {error}") from error
        for name, values in zip(names, parts[-1], strict=True):
            if len(values) != batch_size:
                raise GateError(
                    f"output {name!r}, batch size {batch_size}: onnxruntime returns {len(values)} row(s); the graph "
                    "has a fixed number of rows"
                )
    return {
        name: np.concatenate(values)[:num_rows] for name, values in zip(names, zip(*parts, strict=True), strict=True)
    }


def _versions(graph: bytes) -> dict[str, Any]:
    model = onnx.load_from_string(graph)
    return {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
    }
