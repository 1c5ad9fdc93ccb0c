"""Walks a graph, its subgraphs and local functions node by node, and derives each tensor's dimension of the rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

from maas_ray.bundle.axis import control
from maas_ray.bundle.axis.nodes import GraphNode
from maas_ray.bundle.axis.rules import ACROSS, BY_RANGE, RANDOM, RULES
from maas_ray.bundle.axis.sizes import Number, Size
from maas_ray.bundle.axis.values import MAX_KNOWN, Known, Mixed, Refusal, Value, held, unsure

Env = dict[str, Known]

MAX_STEPS = 200_000
"""Maximum visited nodes, counting the bodies of loops and functions at each visit; larger graphs are not analyzed."""
MAX_DEPTH = 24
"""Nesting of subgraphs and functions."""


def read_tensor(tensor: TensorProto) -> Value:
    """The abstract value of a constant, with its elements if it is small."""
    shape = [Size(size) for size in tensor.dims]
    count = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    if count > MAX_KNOWN or len(shape) > 1 or tensor.data_type in (TensorProto.STRING, TensorProto.BFLOAT16):
        return Value(tuple(shape), dtype=tensor.data_type)
    try:
        array = numpy_helper.to_array(tensor)
        numbers = [float(each) for each in array.ravel().tolist()]
    except Exception:  # a datatype of a few bits, or bytes that do not fit, which the inspection reports
        return Value(tuple(shape), dtype=tensor.data_type)
    is_whole = array.dtype.kind in "iub"
    exact = array.ravel().tolist() if is_whole else numbers
    content: list[Number] = [Size(int(each)) if is_whole or each.is_integer() else each for each in exact]
    return held(shape, content, tensor.data_type)


class Walk:
    """One analysis of a model; see `run`."""

    def __init__(self, model: ModelProto) -> None:
        self._functions = {(each.domain, each.name, each.overload): each for each in model.functions}
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._steps = 0

    def run(self, graph: GraphProto, inputs: Mapping[str, Value]) -> list[Known]:
        """The outputs of the main graph.

        Args:
            graph: graph with its nodes in execution order.
            inputs: by name; other inputs have defaults, which callers may override.
        """
        env: Env = dict(inputs)
        defaults = {value.name for value in graph.input}
        for tensor in graph.initializer:
            known = read_tensor(tensor)
            env.setdefault(tensor.name, replace(known, content=None) if tensor.name in defaults else known)
        return self._graph(graph, env, self._opsets, "", 0)

    def _graph(self, graph: GraphProto, env: Env, opsets: Mapping[str, int], path: str, depth: int) -> list[Known]:
        if path:
            for tensor in graph.initializer:
                env[tensor.name] = read_tensor(tensor)
        for sparse in graph.sparse_initializer:
            env[sparse.values.name] = Value(tuple(Size(size) for size in sparse.dims), dtype=sparse.values.data_type)
        self._nodes(graph.node, env, opsets, {}, path, depth)
        return [env.get(output.name, _missing(output.name)) for output in graph.output]

    def _nodes(
        self,
        nodes: Iterable[NodeProto],
        env: Env,
        opsets: Mapping[str, int],
        given: Mapping[str, AttributeProto],
        path: str,
        depth: int,
    ) -> None:
        for index, proto in enumerate(nodes):
            self._steps += 1
            title = f"node {proto.name!r} ({proto.op_type})" if proto.name else f"node number {index} ({proto.op_type})"
            try:
                results = self._node(proto, env, opsets, given, f"{path}{index}.", depth)
            except Refusal as refusal:
                results = [Mixed(f"{title} {refusal.text}", refusal.is_across)] * len(proto.output)
            except Exception as error:  # a form that the rule does not support: nothing is known about the result
                results = [Mixed(f"{title} has a form that cannot be analyzed ({type(error).__name__})", False)] * len(
                    proto.output
                )
            results += [Mixed(f"{title} has more outputs than its rule defines", False)] * (
                len(proto.output) - len(results)
            )
            for name, result in zip(proto.output, results, strict=False):
                if name:
                    env[name] = result

    def _node(
        self,
        proto: NodeProto,
        env: Env,
        opsets: Mapping[str, int],
        given: Mapping[str, AttributeProto],
        path: str,
        depth: int,
    ) -> list[Known]:
        if self._steps > MAX_STEPS or depth > MAX_DEPTH:
            raise unsure("is part of a graph that is too large to be analyzed")
        attributes = [_resolved(each, given) for each in proto.attribute]
        found = [env.get(name, _missing(name)) if name else None for name in proto.input]
        function = self._functions.get((proto.domain, proto.op_type, proto.overload))
        if function is not None:
            return self._call(function, found, attributes, path, depth)
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        opset = opsets.get(domain) or opsets.get(domain or "ai.onnx") or 1
        if not domain and proto.op_type in control.RULES:

            def body(graph: GraphProto, inputs: Sequence[Known], name: str) -> list[Known]:
                return self._body(graph, inputs, env, opsets, f"{path}{name}.", depth)

            given_graphs = {each.name: each for each in attributes if each is not None}
            return control.RULES[proto.op_type](control.Control(proto.op_type, opset, found, given_graphs, body, path))
        for value in found:
            if isinstance(value, Mixed):
                return [value] * len(proto.output)
        values = [value for value in found if not isinstance(value, Mixed)]
        read = {each.name: _read(each) for each in attributes if each is not None}
        return list(self._apply(GraphNode(proto.op_type, opset, values, read, len(proto.output), path), domain))

    def _apply(self, node: GraphNode, domain: str) -> Sequence[Known]:
        given = [value for value in node.inputs if value is not None]
        has_rows = any(value.axis is not None for value in given)
        if node.op in RANDOM:
            raise unsure("draws random numbers")
        if node.op == "Constant":
            return [_constant(node)]
        rule = RULES.get(domain, {}).get(node.op)
        try:
            if has_rows and node.op in BY_RANGE:
                raise unsure(BY_RANGE[node.op])
            if has_rows and node.op in ACROSS:
                raise Refusal(ACROSS[node.op])
            if rule is None:
                name = f"{domain}::{node.op}" if domain else node.op
                raise unsure(f"is not in the table of operators that keep rows apart ({name})")
            return rule(node)
        except Exception:
            if has_rows:
                raise
            # A result that is computed only from values that are the same for all rows is the same for all rows.
            by_rows = any(value.by_rows for value in given)
            return [Value(by_rows=by_rows)] * node.num_outputs

    def _call(
        self,
        function: FunctionProto,
        inputs: Sequence[Known | None],
        attributes: Sequence[AttributeProto | None],
        path: str,
        depth: int,
    ) -> list[Known]:
        env: Env = {name: value for name, value in zip(function.input, inputs, strict=False) if value is not None}
        given = {each.name: each for each in function.attribute_proto}
        given |= {each.name: each for each in attributes if each is not None}
        opsets = {entry.domain: entry.version for entry in function.opset_import}
        self._nodes(function.node, env, {**self._opsets, **opsets}, given, path, depth + 1)
        return [env.get(name, _missing(name)) for name in function.output]

    def _body(
        self, graph: GraphProto, inputs: Sequence[Known], env: Env, opsets: Mapping[str, int], path: str, depth: int
    ) -> list[Known]:
        """The outputs of a subgraph, which can also use the tensors of the enclosing graph."""
        inner = {**env, **{value.name: known for value, known in zip(graph.input, inputs, strict=False)}}
        return self._graph(graph, inner, opsets, path, depth + 1)


def _missing(name: str) -> Mixed:
    return Mixed(f"tensor {name!r} is not defined before it is used", False)


def _constant(node: GraphNode) -> Value:
    for name, value in node.attributes.items():
        if isinstance(value, Value):
            return value
        if name in ("value_int", "value_float"):
            return held((), [_number(value)])
        if name in ("value_ints", "value_floats"):
            return held((Size(len(value)),), [_number(each) for each in value])
        if name == "value_strings":
            return Value((Size(len(value)),), dtype=TensorProto.STRING)
    return Value(())


def _number(value: float | int) -> Number:
    return Size(int(value)) if float(value).is_integer() else float(value)


def _resolved(attribute: AttributeProto, given: Mapping[str, AttributeProto]) -> AttributeProto | None:
    """An attribute of a node in a function, which may refer to one of the call."""
    if not attribute.ref_attr_name:
        return attribute
    found = given.get(attribute.ref_attr_name)
    if found is None:
        return None
    named = AttributeProto()
    named.CopyFrom(found)
    named.name = attribute.name
    return named


def _read(attribute: AttributeProto) -> Any:
    if attribute.type == AttributeProto.TENSOR:
        return read_tensor(attribute.t)
    if attribute.type == AttributeProto.SPARSE_TENSOR:
        sparse: SparseTensorProto = attribute.sparse_tensor
        return Value(tuple(Size(size) for size in sparse.dims))
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.TENSORS):
        return None
    return helper.get_attribute_value(attribute)
