"""Checks an ONNX graph before any session is made of it: a bundle is data from elsewhere. Runs no node.

Refused: what the onnx checker refuses, weights outside the file, operators of other domains (they may be native
code), tensors whose bytes are not what their shape says, and a graph that is not what the signature declares.
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
    """Checks that a graph is safe to load and is what its signature declares.

    Args:
        graph: the serialized `ModelProto`.
        signature: what the bundle's description promises to callers.

    Returns:
        The model, for further looks.

    Raises:
        BundleError: the first thing that is wrong, with the name of the node, tensor or input.
    """
    if not graph or len(graph) > MAX_GRAPH_BYTES:
        raise BundleError(f"the graph has {len(graph)} bytes; a servable one has 1 to {MAX_GRAPH_BYTES}")
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
                "ai.onnx.ml and a list of com.microsoft's are served, export the model without that operator"
            )
    for tensor in tensors_of(model):
        _check_tensor(tensor)
    # Only now: the checker would follow the paths of external data.
    with _undomained_apart(model):
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise BundleError(f"the onnx checker refuses the graph: {str(error).splitlines()[0]}") from error
    defaults = _defaults(model)
    if wrong := [tensor.name for tensor in signature.inputs if tensor.optional and tensor.name not in defaults]:
        raise BundleError(f"input {wrong[0]!r} is declared optional, but has no default value in the graph")
    declared = {tensor.name for tensor in signature.inputs}
    # Bundles of earlier versions do not declare inputs with default values.
    given = [value for value in model.graph.input if value.name in declared or value.name not in defaults]
    _compare("input", signature.inputs, given)
    _compare("output", signature.outputs, model.graph.output)
    return model


def signature_of(graph: bytes) -> Signature:
    """The signature as the graph itself states it; sizes that are variable or unknown are -1.

    Raises:
        BundleError: an input or output is not a tensor of a datatype that can be served, or has no shape.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:
        raise BundleError("the graph is not an ONNX model: its bytes cannot be decoded") from error
    defaults = _defaults(model)
    # Before IR version 4 every constant had to be an input, and onnxruntime lets nobody replace it.
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
            f"carries tensors only: export the model so that this {what} is one"
            + (" (for the classifiers of scikit-learn and onnxmltools: zipmap=False)" if what == "output" else "")
        )
    shape = _shape(value)
    if shape is None:
        raise BundleError(
            f"{what} {value.name!r} has no shape in the graph; give it one (--shape {value.name}=-1,3), or export the "
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
        raise BundleError(f"the signature declares the {what}s {sorted(specs)}, the graph has {sorted(values)}")
    for name, value in values.items():
        spec = specs[name]
        kind = ONNX.get(value.type.tensor_type.elem_type)
        if not value.type.HasField("tensor_type") or kind not in NUMPY:
            raise BundleError(f"{what} {name!r} is not a tensor of a datatype that can be served; export it as FP32")
        if kind != spec.datatype:
            raise BundleError(f"{what} {name!r} is declared {spec.datatype}, in the graph it is {kind}")
        shape = _shape(value)
        fits = shape is None or (
            len(shape) == len(spec.shape) and all(a is None or a == b for a, b in zip(shape, spec.shape, strict=True))
        )
        if not fits:
            raise BundleError(f"{what} {name!r} is declared {list(spec.shape)}, in the graph it is {shape}")


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
        raise BundleError(f"tensor {tensor.name!r} lies outside the file; export the model with inline weights")
    if any(size < 0 for size in tensor.dims):
        raise BundleError(f"tensor {tensor.name!r} has the impossible shape {list(tensor.dims)}")
    kind = ONNX.get(tensor.data_type)
    if tensor.raw_data and kind is not None and kind != "BYTES":
        size = 2 if kind == "BF16" else NUMPY[kind].itemsize
        if len(tensor.raw_data) != prod(tensor.dims) * size:
            raise BundleError(
                f"tensor {tensor.name!r} of shape {list(tensor.dims)} and datatype {kind} holds "
                f"{len(tensor.raw_data)} bytes instead of {prod(tensor.dims) * size}"
            )


def _graphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The bodies of loops and conditions, however deep."""
    for node in nodes:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for graph in inner:
                yield graph
                yield from _graphs(graph.node)


@contextmanager
def _undomained_apart(model: ModelProto) -> Iterator[None]:
    """Moves onnxruntime's operators without a domain to its own one meanwhile, which ONNX's checker does not look into."""
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
    """Every tensor with bytes of its own: weights and attributes, in bodies and functions too."""
    inner = [graph for function in model.functions for graph in _graphs(function.node)]
    for graph in (model.graph, *_graphs(model.graph.node), *inner):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
