"""Adapts an ONNX file for serving without changing its results: sets shapes, and removes ZipMap. Runs no node.

ZipMap (ai.onnx.ml) converts a classifier's tensor of probabilities to a sequence of maps, which the protocol cannot
represent; scikit-learn's and onnxmltools' converters add it by default. Here the tensor itself becomes the output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, ValueInfoProto, helper

from maas_ray.bundle.graph.external import OnnxFile
from maas_ray.errors import SpecError
from maas_ray.suggestions import known_names

Sizes = tuple[int | str, ...]
"""Sizes of a tensor; a string names a variable size, and -1 is a variable size without a name."""

_ML = "ai.onnx.ml"


@dataclass(frozen=True)
class Adapted:
    """An adapted file."""

    file: OnnxFile
    labels: tuple[str, ...] | None
    """Class names in the file; None: it has none."""
    changes: tuple[str, ...]
    """Descriptions of the changes; empty: no changes."""


def adapt(file: OnnxFile, shapes: Mapping[str, Sizes] | None = None) -> Adapted:
    """Removes ZipMap, sets the given shapes and infers those of outputs.

    Args:
        file: the file that was read.
        shapes: by input or output; only sizes that the graph does not define can be set.

    Raises:
        SpecError: a shape is for a tensor that does not exist, or contradicts the graph.
    """
    model = onnx.load_model_from_string(file.graph)
    labels, changes = None, []
    for node, output in _zip_maps(model.graph):
        labels = _remove(model, node, output)
        changes.append(f"output {output.name!r} is the tensor of probabilities; its ZipMap was removed")
    outputs = {value.name for value in model.graph.output}
    # Inputs first: they determine shapes of outputs, so that a contradicting output shape is rejected.
    ordered = sorted((shapes or {}).items(), key=lambda given: given[0] in outputs)
    for name, sizes in ordered:
        if name in outputs:
            _infer(model)
        _set_shape(model.graph, name, sizes)
        changes.append(f"the shape of {name!r} was set to {list(sizes)}")
    if changes or any(not _has_shape(output) for output in model.graph.output):
        _infer(model)
        file = OnnxFile(model.SerializeToString(), file.sha256, file.producer)
    return Adapted(file, labels, tuple(changes))


def read_shapes(texts: list[str]) -> dict[str, Sizes]:
    """Parses shapes of the command line: `name=-1,3`, `ids=batch,seq`, `scalar=`.

    Raises:
        SpecError: a shape has another form.
    """
    shapes: dict[str, Sizes] = {}
    for text in texts:
        name, is_given, sizes = text.rpartition("=")
        try:
            shapes[name] = tuple(_size(part) for part in sizes.split(",")) if sizes else ()
        except ValueError:
            is_given = ""
        if not is_given or not name:
            raise SpecError(f"shape {text[:120]!r} is not of the form NAME=SIZES, such as x=-1,3 or ids=batch,seq")
    return shapes


def _size(text: str) -> int | str:
    text = text.strip()
    if text.isidentifier():
        return text
    size = int(text)
    if size < -1:
        raise ValueError(text)
    return size


def _zip_maps(graph: GraphProto) -> Iterator[tuple[NodeProto, ValueInfoProto]]:
    outputs = {value.name: value for value in graph.output}
    inner = {name for node in graph.node for name in node.input}
    for node in list(graph.node):
        is_last = node.op_type == "ZipMap" and node.domain == _ML and node.output[:1] and node.output[0] not in inner
        if is_last and node.output[0] in outputs:
            yield node, outputs[node.output[0]]


def _remove(model: ModelProto, node: NodeProto, output: ValueInfoProto) -> tuple[str, ...] | None:
    """Replaces the maps by the tensor; returns the class names that were their keys."""
    names: tuple[str, ...] | None = None
    for attribute in node.attribute:
        if attribute.name == "classlabels_strings" and attribute.strings:
            names = tuple(text.decode("utf-8", "replace") for text in attribute.strings)
        elif attribute.name == "classlabels_int64s" and attribute.ints:
            names = tuple(str(number) for number in attribute.ints)
    place = list(model.graph.node).index(node)
    identity = helper.make_node("Identity", [node.input[0]], [output.name], name=node.name)
    model.graph.node.remove(node)
    model.graph.node.insert(place, identity)
    first = model.graph.input[0].type.tensor_type.shape.dim[:1] if model.graph.input else []
    rows: int | str = first[0].dim_value or first[0].dim_param or "N" if first else "N"
    width: int | str = len(names) if names else "classes"
    output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [rows, width]))
    return names


def _set_shape(graph: GraphProto, name: str, sizes: Sizes) -> None:
    tensors = {value.name: value for value in (*graph.input, *graph.output)}
    value = tensors.get(name)
    if value is None or value.type.WhichOneof("value") != "tensor_type":
        raise SpecError(
            f"cannot set the shape of {name!r}: no such input or output; {known_names(name, list(tensors), 'tensors')}"
        )
    known = value.type.tensor_type.shape.dim if value.type.tensor_type.HasField("shape") else None
    if known is not None and (
        len(known) != len(sizes)
        or any(dim.dim_value and dim.dim_value != size for dim, size in zip(known, sizes, strict=True))
    ):
        shown = [dim.dim_value or dim.dim_param or "?" for dim in known]
        raise SpecError(
            f"the shape {list(sizes)} of {name!r} contradicts the shape {shown} in the graph; change or omit it"
        )
    dims = [
        TensorShapeProto.Dimension(dim_value=size)
        if isinstance(size, int) and size >= 0
        else TensorShapeProto.Dimension(
            dim_param=size if isinstance(size, str) else f"{name}_{axis}" if axis else "batch"
        )
        for axis, size in enumerate(sizes)
    ]
    value.type.tensor_type.shape.CopyFrom(TensorShapeProto(dim=dims))


def _has_shape(value: ValueInfoProto) -> bool:
    return value.type.WhichOneof("value") != "tensor_type" or bool(value.type.tensor_type.HasField("shape"))


def _infer(model: ModelProto) -> None:
    """Infers missing shapes of outputs, which older exporters omit and the checker requires."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # native code with its own exception classes; the inspection reports missing shapes
        return
    for output, found in zip(model.graph.output, inferred.graph.output, strict=True):
        if not _has_shape(output):
            output.CopyFrom(found)
