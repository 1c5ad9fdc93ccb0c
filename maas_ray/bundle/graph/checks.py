"""Checks an ONNX graph before a session is created from it, because a bundle is untrusted data. Runs no node.

Rejected: graphs that the onnx checker rejects, weights outside the file, operators of other domains (they may be native
code), tensors whose bytes do not match their shape, and graphs that do not match the signature.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from maas_ray.bundle.datatypes import NUMPY, ONNX
from maas_ray.bundle.format import MAX_GRAPH_BYTES, Signature, TensorSpec
from maas_ray.bundle.graph import contrib
from maas_ray.bundle.graph.extent import check_extent
from maas_ray.bundle.graph.functions import check_functions, function_of
from maas_ray.errors import BundleError

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_FIRST_IR_WITH_DEFAULTS = 4
_KINDS = {
    "sequence_type": "sequence",
    "map_type": "map",
    "optional_type": "optional value",
    "sparse_tensor_type": "sparse tensor",
    "opaque_type": "opaque value",
}


def inspect_graph(graph: bytes, signature: Signature) -> ModelProto:
    """Checks that a graph is safe to load and matches its signature.

    Args:
        graph: the serialized `ModelProto`.
        signature: signature in the bundle's description.

    Returns:
        The model, for further checks.

    Raises:
        BundleError: the first error, with the name of the node, tensor or input.
    """
    if not graph or len(graph) > MAX_GRAPH_BYTES:
        raise BundleError(f"the graph has {len(graph)} bytes; a servable graph has 1 to {MAX_GRAPH_BYTES} bytes")
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:  # protobuf's classes differ between its implementations
        raise BundleError("the graph is not an ONNX model: its bytes cannot be decoded; export it again") from error
    local = check_functions(model)
    check_extent(model)
    for node in _nodes(model):
        is_known = node.domain in ALLOWED_DOMAINS or (
            node.domain == contrib.DOMAIN and node.op_type in contrib.OPERATORS
        )
        if not is_known and function_of(node) not in local:
            raise BundleError(
                f"node {node.name!r} is {node.domain}::{node.op_type}; only operators of the domains ai.onnx and "
                "ai.onnx.ml and some of com.microsoft are supported; export the model without this operator"
            )
    for tensor in tensors_of(model):
        _check_tensor(tensor)
    # Only after the checks above: the checker would follow the paths of external data.
    with _undomained_apart(model):
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise BundleError(
                f"the onnx checker rejects the graph: {str(error).splitlines()[0]}; export the model again"
            ) from error
    defaults = _defaults(model)
    if wrong := [tensor.name for tensor in signature.inputs if tensor.optional and tensor.name not in defaults]:
        raise BundleError(f"input {wrong[0]!r} is declared optional but has no default value in the graph")
    declared = {tensor.name for tensor in signature.inputs}
    # Bundles of earlier versions do not declare inputs with default values.
    given = [value for value in model.graph.input if value.name in declared or value.name not in defaults]
    _compare("input", signature.inputs, given)
    _compare("output", signature.outputs, model.graph.output)
    return model


def signature_of(graph: bytes) -> Signature:
    """The signature that the graph itself declares; variable or unknown sizes are -1.

    Raises:
        BundleError: an input or output is not a tensor of a supported datatype, or has no shape.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:
        raise BundleError("the graph is not an ONNX model: its bytes cannot be decoded") from error
    defaults = _defaults(model)
    # Before IR version 4 every constant had to be an input, which onnxruntime does not allow to be overridden.
    hidden = defaults if model.ir_version < _FIRST_IR_WITH_DEFAULTS else frozenset()
    inputs = [value for value in model.graph.input if value.name not in hidden]
    return Signature(
        inputs=tuple(_spec(value, "input", is_optional=value.name in defaults) for value in inputs),
        outputs=tuple(_spec(value, "output") for value in model.graph.output),
    )


def _defaults(model: ModelProto) -> frozenset[str]:
    """Inputs that have a value in the graph."""
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return frozenset(value.name for value in model.graph.input if value.name in given)


def _spec(value: ValueInfoProto, what: str, *, is_optional: bool = False) -> TensorSpec:
    if (kind_of_value := value.type.WhichOneof("value")) != "tensor_type":
        raise BundleError(
            f"{what} {value.name!r} is a {_KINDS.get(kind_of_value or '', 'value of an unknown type')}; the protocol "
            f"supports only tensors; export the model so that this {what} is a tensor"
            + (" (for the classifiers of scikit-learn and onnxmltools: zipmap=False)" if what == "output" else "")
        )
    shape = _shape(value)
    if shape is None:
        raise BundleError(
            f"{what} {value.name!r} has no shape in the graph; set it (--shape {value.name}=-1,3), or export the "
            "model with shapes"
        )
    kind = ONNX.get(value.type.tensor_type.elem_type)
    if kind is None:
        raise BundleError(f"{what} {value.name!r} is not a tensor of a datatype of the Open Inference Protocol")
    sizes = tuple(-1 if size is None else size for size in shape)
    return TensorSpec(name=value.name, datatype=kind, shape=sizes, optional=is_optional)


def _compare(what: str, declared: Iterable[TensorSpec], found: Iterable[ValueInfoProto]) -> None:
    specs = {spec.name: spec for spec in declared}
    values = {value.name: value for value in found}
    if specs.keys() != values.keys():
        raise BundleError(f"the signature declares the {what}s {sorted(specs)}; the graph has {sorted(values)}")
    for name, value in values.items():
        spec = specs[name]
        kind = ONNX.get(value.type.tensor_type.elem_type)
        if not value.type.HasField("tensor_type") or kind not in NUMPY:
            raise BundleError(f"{what} {name!r} is not a tensor of a supported datatype; export it as FP32")
        if kind != spec.datatype:
            raise BundleError(f"{what} {name!r} is declared as {spec.datatype}, but is {kind} in the graph")
        shape = _shape(value)
        fits = shape is None or (
            len(shape) == len(spec.shape) and all(a is None or a == b for a, b in zip(shape, spec.shape, strict=True))
        )
        if not fits:
            raise BundleError(
                f"{what} {name!r} is declared with the shape {list(spec.shape)}, but has {shape} in the graph"
            )


def _shape(value: ValueInfoProto) -> list[int | None] | None:
    """Sizes, -1 for a named variable size, None for an unknown one; None for an unknown rank."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else -1 if dim.HasField("dim_param") else None
        for dim in tensor.shape.dim
    ]


def _check_tensor(tensor: TensorProto) -> None:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise BundleError(f"tensor {tensor.name!r} is stored outside the file; export the model with inline weights")
    if any(size < 0 for size in tensor.dims):
        raise BundleError(f"tensor {tensor.name!r} has the impossible shape {list(tensor.dims)}")
    kind = ONNX.get(tensor.data_type)
    if tensor.raw_data and kind is not None and kind != "BYTES":
        size = 2 if kind == "BF16" else NUMPY[kind].itemsize
        if len(tensor.raw_data) != prod(tensor.dims) * size:
            raise BundleError(
                f"tensor {tensor.name!r} of shape {list(tensor.dims)} and datatype {kind} has "
                f"{len(tensor.raw_data)} bytes instead of {prod(tensor.dims) * size}"
            )


def _graphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The bodies of loops and conditions at any depth."""
    for node in nodes:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for graph in inner:
                yield graph
                yield from _graphs(graph.node)


@contextmanager
def _undomained_apart(model: ModelProto) -> Iterator[None]:
    """Temporarily moves onnxruntime's operators without a domain to its own domain, which ONNX's checker ignores."""
    found = [
        (node, node.domain)
        for node in _nodes(model)
        if node.op_type in contrib.UNDOMAINED and node.domain in ("", "ai.onnx")
    ]
    if not found:
        yield
        return
    imports = [model.opset_import, *(function.opset_import for function in model.functions)]
    added = [opsets for opsets in imports if all(opset.domain != contrib.DOMAIN for opset in opsets)]
    for node, _ in found:
        node.domain = contrib.DOMAIN
    for opsets in added:
        opsets.append(helper.make_opsetid(contrib.DOMAIN, 1))
    try:
        yield
    finally:
        for node, domain in found:
            node.domain = domain
        for opsets in added:
            del opsets[-1]


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from nodes
        for graph in _graphs(nodes):
            yield from graph.node


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor with data: weights and attributes, also in bodies and functions."""
    inner = [graph for function in model.functions for graph in _graphs(function.node)]
    for graph in (model.graph, *_graphs(model.graph.node), *inner):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
