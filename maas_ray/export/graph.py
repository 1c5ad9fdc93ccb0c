"""Edits ONNX graphs: stable names, raw categorical inputs, no traces of the machine. Independent of torch."""

from collections.abc import Iterable, Iterator, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from maas_ray.data.spec.features import CategoricalColumn
from maas_ray.errors import BundleError
from maas_ray.version import __version__

BATCH = "batch"
"""Name of the variable first dimension of every input and output."""

_ML_DOMAIN = "ai.onnx.ml"
_ML_OPSET = 3  # contains version 2 of LabelEncoder: one typed list of keys and one of values


def rename_values(graph: GraphProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names inputs and outputs as given, weights as in the model, and all other values by number.

    The exporter's own names depend on counters of the process and could equal the name of a column.

    Args:
        graph: changed in place.
        inputs: new names in the graph's order.
        outputs: likewise.
    """
    names = {value.name: name for value, name in zip(graph.input, inputs, strict=True)}
    names |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}
    names[""] = ""  # an omitted optional input
    taken = set(names.values())

    def rename(name: str, wanted: str) -> str:
        if name not in names:
            while wanted in taken:
                wanted += "_"
            names[name] = wanted
            taken.add(wanted)
        return names[name]

    for part in _graphs(graph):
        for tensor in part.initializer:
            # Weights keep their names in the model, so that a reader of the graph can identify them.
            tensor.name = rename(tensor.name, tensor.name)
        for value in (*part.input, *part.output):
            value.name = rename(value.name, f"value_{len(names)}")
        for node in part.node:
            for field in (node.input, node.output):
                field[:] = [rename(name, f"value_{len(names)}") for name in field]
    for i, node in enumerate(node for part in _graphs(graph) for node in part.node):
        node.name = f"{node.op_type}_{i}"


def encode_inputs(graph: GraphProto, columns: Iterable[CategoricalColumn]) -> None:
    """Puts a LabelEncoder before each categorical input, which then takes raw strings or integers.

    A category becomes its code, a missing value (an empty string) the code of the fill, any other value its `unknown_code`.
    """
    values = {value.name: value for value in graph.input}
    encoders = []
    for column in columns:
        codes = _free_name(graph, f"codes of {column.name}")
        for node in (node for part in _graphs(graph) for node in part.node):
            node.input[:] = [codes if name == column.name else name for name in node.input]
        encoders.append(_label_encoder(column, codes))
        is_text = column.datatype == "BYTES"
        values[column.name].type.tensor_type.elem_type = TensorProto.STRING if is_text else TensorProto.INT64
    nodes = [*encoders, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def name_batch(graph: GraphProto) -> None:
    """Names the first dimension of all inputs and outputs.

    Raises:
        BundleError: one is a fixed number, or differs from that of the first input.
    """
    found = set()
    for value in (*graph.input, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        if not sizes or not sizes[0].dim_param:
            shape = [size.dim_param or size.dim_value for size in sizes]
            raise BundleError(
                f"the exported graph has a fixed number of rows: {value.name!r} has the shape {shape}; remove "
                "operations that depend on the number of rows from the model"
            )
        found.add(sizes[0].dim_param)
        sizes[0].dim_param = BATCH
    if len(found) > 1:
        raise BundleError(f"inputs and outputs of the exported graph differ in their number of rows: {sorted(found)}")


def finish(model: ModelProto) -> bytes:
    """Removes traces of the machine and the time, checks the model and serializes it deterministically.

    Raises:
        BundleError: the model is not valid ONNX.
    """
    graph = model.graph
    used = {node.domain for part in _graphs(graph) for node in part.node} | {
        node.domain for function in model.functions for node in function.node
    }
    versions = {entry.domain: entry.version for entry in model.opset_import} | {_ML_DOMAIN: _ML_OPSET}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, versions[domain]) for domain in sorted(used | {""}))
    model.producer_name, model.producer_version, model.doc_string, model.domain = "maas-ray", __version__, "", ""
    del model.metadata_props[:]
    graph.name, graph.doc_string = "model", ""
    for part in (*_graphs(graph), *model.functions):
        del part.metadata_props[:]
        del part.value_info[:]
        for node in part.node:
            node.doc_string = ""
            del node.metadata_props[:]
    for part in _graphs(graph):
        for entry in (*part.input, *part.output, *part.initializer):
            entry.doc_string = ""
            del entry.metadata_props[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(f"the exported graph is not valid ONNX: {error}") from error
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs inside its nodes (branches and loop bodies)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                yield from _graphs(inner)


def _free_name(graph: GraphProto, name: str) -> str:
    taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    taken |= {output for part in _graphs(graph) for node in part.node for output in node.output}
    while name in taken:
        name += "_"
    return name


def _label_encoder(column: CategoricalColumn, output: str) -> NodeProto:
    is_text = column.datatype == "BYTES"
    keys: list[str | int] = list(column.categories)
    codes = list(range(len(keys)))
    if is_text and column.fill is not None:
        keys.append("")
        codes.append(column.fill)
    return helper.make_node(
        "LabelEncoder",
        [column.name],
        [output],
        name=output,
        domain=_ML_DOMAIN,
        **{"keys_strings" if is_text else "keys_int64s": keys},
        values_int64s=codes,
        default_int64=column.unknown_code,
    )
