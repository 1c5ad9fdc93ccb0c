"""Exports a trained module to one ONNX graph that takes raw columns. Independent of runs, stores and runtimes."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from maas_ray.bundle.format import MAX_GRAPH_BYTES, BatchAxis, Datatype, Signature, TensorSpec
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.loading.target_units import TargetUnits
from maas_ray.data.sources.wide import narrowing_of
from maas_ray.data.spec.features import Column, Features, Task, is_wide
from maas_ray.decoding.spec import TextEncoding
from maas_ray.errors import BundleError
from maas_ray.export.column_names import refuse_names
from maas_ray.export.graph import BATCH, encode_inputs, finish, name_batch, rename_values
from maas_ray.export.obstacles import explain, watch_guards
from maas_ray.models.hugging_face.formats import has_hf_format

OPSET = 18
"""The opset of torch's translations: no version conversion is involved."""
TRACED_ROWS = 2
"""Rows of the example; fewer than two would be treated as a constant."""

_OUTPUTS: dict[str, tuple[tuple[str, Datatype], ...]] = {
    "classification": (("probabilities", "FP32"), ("class", "INT64")),
    "binary": (("probability", "FP32"), ("class", "INT64")),
    "regression": (("prediction", "FP32"),),
}


class ServedModel(nn.Module):
    """Preprocessing, trained net and the task's head: the exported graph's computation after encoding categories.

    Args:
        net: module from float32 [N, *features.row.shape] to logits [N, features.num_outputs].
        features: the fitted features.
        threshold: binary: a row is of class 1 if its probability is at least this.
    """

    def __init__(self, net: nn.Module, features: Features, threshold: float = 0.5) -> None:
        super().__init__()
        self.preprocess = Preprocess(features)
        self.net = net
        self.units = TargetUnits(features.target_scaling)
        self._task, self._threshold = features.task, threshold

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """From encoded columns to the outputs.

        Args:
            *columns: as `Preprocess` takes them.

        Returns:
            classification: probabilities float32 [N, C] and class codes int64 [N]; binary: the probability of class 1
            float32 [N, 1] and class codes int64 [N]; regression: the prediction float32 [N, 1], in
            the units of the data.
        """
        logits = self.net(self.preprocess(*columns))
        if self._task == "classification":
            probabilities = logits.softmax(dim=1)
            return probabilities, probabilities.argmax(dim=1)
        if self._task == "binary":
            probability = logits.sigmoid()
            return probability, (probability[:, 0] >= self._threshold).to(torch.int64)
        return (self.units(logits),)


class _Narrowed(nn.Module):
    """A module over encoded columns, to which columns of float64 are given raw.

    Args:
        module: takes encoded columns.
        features: the fitted features.
    """

    def __init__(self, module: nn.Module, features: Features) -> None:
        super().__init__()
        self.module = module
        self._narrowings = [narrowing_of(column) for column in features.columns]

    def forward(self, *columns: Tensor) -> Any:
        encoded = [
            column if narrowing is None else narrowing.apply(torch, column)
            for column, narrowing in zip(columns, self._narrowings, strict=True)
        ]
        return self.module(*encoded)


def build_served(net: nn.Module, features: Features, threshold: float = 0.5) -> ServedModel:
    """A ServedModel with a copy of the net, in evaluation mode on the CPU; the net itself is unchanged."""
    return ServedModel(copy.deepcopy(net).cpu(), features, threshold).eval()


def build_signature(features: Features) -> Signature:
    """The graph's inputs (the raw columns by their names) and outputs.

    An output with the name of a column is called `predicted_<name>`, because a graph has one namespace.

    Raises:
        BundleError: a column has an empty name, two have the same name, or the task has logits per token.
    """
    if features.is_per_token:
        raise BundleError(
            f"a bundle has no signature for logits per token, which a model of the task {features.task} has"
        )
    names = [column.name for column in features.columns]
    refuse_names(features)
    inputs = tuple(map(_input, features.columns))
    outputs = []
    for name, datatype in _OUTPUTS[features.task]:
        shape = (-1,) if datatype == "INT64" else (-1, features.num_outputs)
        while name in names:
            name = f"predicted_{name}"
        outputs.append(TensorSpec(name=name, datatype=datatype, shape=shape))
    return Signature(inputs=inputs, outputs=tuple(outputs), batch=BatchAxis(name=BATCH, origin="exporter"))


def export(net: nn.Module, features: Features, threshold: float = 0.5) -> tuple[bytes, Signature]:
    """Exports preprocessing, net and head as one ONNX graph over raw columns, with any number of rows.

    The same weights and features give the same bytes, without traces of the machine. Prints nothing.

    Args:
        net: the trained module, on any device, in any mode; it is not changed.
        features: the fitted features.
        threshold: binary: the decision threshold, see `ServedModel`.

    Returns:
        The serialized ONNX model with its weights inside, and the signature of its inputs and outputs.

    Raises:
        BundleError: the net cannot be exported, has a fixed number of rows, or is larger than a graph may be.
    """
    if features.is_per_token:
        raise BundleError(explain_per_token(net, features.task))
    signature = build_signature(features)
    refuse_size(net)
    model = trace(build_served(net, features, threshold), type(net).__name__, features)
    return seal_graph(model, signature, features), signature


def refuse_size(net: nn.Module) -> None:
    """Raises BundleError if the weights, which need not have data, are larger than a graph may be."""
    size = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    if size > MAX_GRAPH_BYTES:
        raise BundleError(
            f"the model has {size} bytes of weights; the limit for an ONNX graph is {MAX_GRAPH_BYTES} bytes"
        )


def explain_per_token(net: nn.Module, task: Task) -> str:
    """Why a model with logits per token has no bundle, and which commands do accept it."""
    reason = f"a bundle has no signature for logits per token, which a model of the task {task} has"
    if has_hf_format(net):
        return f"{reason}; `maas-ray checkpoints export` writes it in Hugging Face's format"
    return (
        f"{reason}, and {type(net).__name__} has no Hugging Face format either; `maas-ray evaluate` measures it, "
        "`maas-ray checkpoints reshard` writes its weights as safetensors, and `init: {run: …}` starts another run from "
        f"them; to serve such a model, train the model {'decoder' if task == 'language_modeling' else 'hf:BertForMaskedLM'}, "
        "which `maas-ray checkpoints export` accepts"
    )


def trace(module: nn.Module, name: str, features: Features) -> ModelProto:
    """Exports a module over encoded columns to ONNX, with the exporter's own names, for any number of rows. In the
    graph, columns of float64 are raw.

    Args:
        module: module with the inputs of `Preprocess`, on the CPU, in evaluation mode.
        name: name of the module for errors.
        features: the fitted features.

    Raises:
        BundleError: it cannot be exported.
    """
    example = tuple(_example(column) for column in features.columns)
    rows = torch.export.Dim("batch")
    with _quiet(), watch_guards() as guards, torch.no_grad():
        try:
            program = torch.export.export(
                _Narrowed(module, features), example, dynamic_shapes=(tuple({0: rows} for _ in example),), strict=False
            )
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, external_data=False, optimize=True, verbose=False
            )
        except Exception as error:  # torch.export raises exceptions of many components
            raise BundleError(explain(error, name, guards)) from error
    if exported is None:
        raise BundleError(f"torch.onnx.export returned no graph for {name}")
    return exported.model_proto


def seal_graph(model: ModelProto, signature: Signature, features: Features) -> bytes:
    """Converts a graph over encoded columns to the bytes of one over raw columns, with the names of the signature.

    Args:
        model: changed in place.
        signature: its inputs and outputs, in the graph's order.
        features: the fitted features.

    Raises:
        BundleError: the graph has a fixed number of rows, or is not valid ONNX.
    """
    rename_values(model.graph, [spec.name for spec in signature.inputs], [spec.name for spec in signature.outputs])
    name_batch(model.graph)
    encode_inputs(model.graph, (column for column in features.columns if column.kind == "categorical"))
    return finish(model)


def _shape(column: Column) -> tuple[int, ...]:
    if column.kind == "tensor":
        return column.shape
    return (column.length,) if column.kind == "tokens" else (1,)


def _input(column: Column) -> TensorSpec:
    """An input with everything that a request may send for it."""
    spec = TensorSpec(
        name=column.name,
        datatype=_datatype(column),
        shape=(-1, *_shape(column)),
        nullable=column.kind != "tokens" and column.fill is not None and _represents_missing(column),
    )
    if column.kind == "categorical" and column.datatype == "INT64" and column.fill is not None:
        return spec.model_copy(update={"nullable": True, "null_value": int(column.categories[column.fill])})
    if column.kind == "numeric" and column.boolean:
        return spec.model_copy(update={"boolean": True})
    if column.kind == "tensor" and column.image is not None:
        return spec.model_copy(update={"encoding": column.image})
    if column.kind == "tokens" and column.pad is not None:
        encoding = TextEncoding(length=column.length, pad=column.pad, tokenizer=column.tokenizer)
        return spec.model_copy(update={"encoding": encoding})
    return spec


def _represents_missing(column: Column) -> bool:
    """Whether a value of the graph's datatype represents "missing": NaN, an empty string."""
    return _datatype(column) in ("FP32", "FP64", "BYTES")


def _datatype(column: Column) -> Datatype:
    if column.kind == "numeric" or column.kind == "date":
        return "FP64" if is_wide(column) else "FP32"
    return column.datatype


def _example(column: Column) -> Tensor:
    if column.kind == "numeric" or column.kind == "date":
        return torch.zeros(TRACED_ROWS, 1, dtype=torch.float64 if is_wide(column) else torch.float32)
    if column.kind in ("categorical", "tokens"):
        return torch.zeros(TRACED_ROWS, *_shape(column), dtype=torch.int64)
    return torch.zeros(TRACED_ROWS, *_shape(column), dtype=torch.uint8 if column.datatype == "UINT8" else torch.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses messages of the exporter that users cannot act on (optional packages, its own deprecations)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # After an error torch prints the whole graph so far.
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
