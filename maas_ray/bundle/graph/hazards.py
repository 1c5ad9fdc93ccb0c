"""Determines from a graph alone how its operators can harm the process that runs them. Runs nothing.

A graph is judged by allow-lists: an unknown operator is assumed to be able to crash, and to have value-dependent sizes.
Bodies and functions are checked too; a function once for each kind of arguments, so that functions that call each other
twice cost nothing.
"""

from collections import ChainMap
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from maas_ray.bundle.graph.operators import (
    CONTROL,
    DIVISIONS,
    GIVES,
    KEEPS,
    ML,
    RANDOM,
    SAFE,
    SAFE_IF_STATIC,
    SIZED_BY,
    SIZED_BY_DATA,
)

MAX_REASONS = 8
MAX_DEPTH = 40
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_MAX_DIVISORS = 1 << 20


@dataclass(frozen=True)
class Hazards:
    """The possible effects of a run of the graph, for some values of some request."""

    has_loops: bool
    """It contains Loop, Scan or If, also in bodies and functions."""
    is_value_bounded: bool
    """Time and sizes depend on the shapes of the inputs only, not on their values."""
    can_trap: bool
    """It contains an operator that is not known to be safe from crashes for all values."""
    reasons: tuple[str, ...] = ()
    """Descriptions of the first few responsible nodes."""


class _Fact(NamedTuple):
    """Known properties of a value before the graph runs."""

    kind: int = 0
    """Its `TensorProto.DataType`; 0: unknown."""
    is_static: bool = False
    """It is the same for all requests of the same shapes."""
    is_divisor: bool = False
    """It is a constant without 0 and -1."""


_UNKNOWN = _Fact()
_Facts = MutableMapping[str, _Fact]


def hazards_of(model: ModelProto) -> Hazards:
    """Judges a graph.

    Args:
        model: the parsed model; its weights are ignored, except integer divisors.

    Returns:
        The hazards. A graph that is nested too deeply to be judged has all of them.
    """
    return _Judge(model).judge()


class _Judge:
    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        self._known: dict[tuple[str, str, str, tuple[_Fact, ...]], tuple[_Fact, ...]] = {}
        self._reasons: dict[str, list[str]] = {"loops": [], "values": [], "trap": []}

    def judge(self) -> Hazards:
        graph = self._model.graph
        self._graph(graph, ChainMap(), 0)
        return Hazards(
            has_loops=bool(self._reasons["loops"]),
            is_value_bounded=not self._reasons["values"],
            can_trap=bool(self._reasons["trap"]),
            reasons=tuple(dict.fromkeys(text for texts in self._reasons.values() for text in texts)),
        )

    def _note(self, what: str, node: NodeProto, text: str) -> None:
        if len(self._reasons[what]) < MAX_REASONS:
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            self._reasons[what].append(
                f"node {node.name or node.output[0] if node.output else ''!r} ({operator}) {text}"
            )

    def _graph(self, graph: GraphProto, facts: _Facts, depth: int) -> None:
        for value in graph.input:
            facts[value.name] = _Fact(value.type.tensor_type.elem_type)
        inputs = {value.name for value in graph.input}
        for tensor in graph.initializer:
            if tensor.name not in inputs:  # a caller may override the others
                facts[tensor.name] = _constant(tensor)
        self._nodes(graph.node, facts, depth)

    def _nodes(self, nodes: Iterable[NodeProto], facts: _Facts, depth: int) -> None:
        for node in nodes:
            key = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
            given = [facts.get(name, _UNKNOWN) if name else None for name in node.input]
            function = self._functions.get((node.domain, node.op_type, node.overload))
            if function is not None:
                self._call(node, function, given, facts, depth)
                continue
            self._operator(node, key, given)
            if key in CONTROL:
                self._note("loops", node, "runs a body whose work depends on more than one shape")
            for body in _bodies(node):
                self._body(node, body, facts, depth)
            _conclude(node, key, given, facts)

    def _operator(self, node: NodeProto, key: tuple[str, str], given: Sequence[_Fact | None]) -> None:
        if key not in SAFE:
            self._note("trap", node, "is not known to be safe for all values")
        elif key in DIVISIONS and not _is_safe_division(node, given):
            self._note("trap", node, "divides integers, which crashes the process for INT_MIN / -1")
        elif not _are_static(given, SAFE_IF_STATIC.get(key, ())):
            self._note("trap", node, "has a size that depends on values of the request")
        elif key[0] == ML and key[1].startswith("TreeEnsemble") and not _is_forest(node):
            self._note("trap", node, "has trees with children before their parents")
        if key in SIZED_BY_DATA or (key not in SAFE and key not in SIZED_BY):
            self._note("values", node, "has a run time that depends on values")
        elif not _are_static(given, SIZED_BY.get(key, ())):
            self._note("values", node, "has an output size that depends on values")

    def _body(self, node: NodeProto, body: GraphProto, facts: _Facts, depth: int) -> None:
        if depth >= MAX_DEPTH:
            self._give_up(node)
            return
        inner = ChainMap({}, *getattr(facts, "maps", [facts]))
        self._graph(body, inner, depth + 1)

    def _call(
        self, node: NodeProto, function: FunctionProto, given: list[_Fact | None], facts: _Facts, depth: int
    ) -> None:
        arguments = tuple(fact or _UNKNOWN for fact in given)
        key = (function.domain, function.name, function.overload, arguments)
        results = self._known.get(key)
        if results is None:
            if depth >= MAX_DEPTH:
                self._give_up(node)
                return
            inner: _Facts = dict(zip(function.input, arguments, strict=False))
            self._nodes(function.node, inner, depth + 1)
            results = self._known[key] = tuple(inner.get(name, _UNKNOWN) for name in function.output)
        facts.update(zip(node.output, results, strict=False))

    def _give_up(self, node: NodeProto) -> None:
        for what in self._reasons:
            self._note(what, node, f"is nested more than {MAX_DEPTH} levels deep")


def _conclude(node: NodeProto, key: tuple[str, str], given: Sequence[_Fact | None], facts: _Facts) -> None:
    """Records the known properties of a node's outputs."""
    is_random = key[1] in RANDOM
    is_static = key in {("", "Shape"), ("", "Size")} or (
        not is_random and key not in CONTROL and all(fact is None or fact.is_static for fact in given)
    )
    for number, name in enumerate(node.output):
        facts[name] = _Fact(_kind(node, key, given) if number == 0 else 0, is_static)
    if key == ("", "Constant"):
        facts[node.output[0]] = next((_constant(a.t) for a in node.attribute if a.name == "value"), _constant_of(node))
    elif key == ("", "Identity") and given and given[0] is not None:
        facts[node.output[0]] = given[0]


def _kind(node: NodeProto, key: tuple[str, str], given: Sequence[_Fact | None]) -> int:
    if key == ("", "Cast"):
        return next((int(a.i) for a in node.attribute if a.name == "to"), 0)
    if key == ("", "ConstantOfShape"):
        return next((int(a.t.data_type) for a in node.attribute if a.name == "value"), int(TensorProto.FLOAT))
    if key in GIVES:
        return GIVES[key]
    place = KEEPS.get(key)
    fact = given[place] if place is not None and place < len(given) else None
    return fact.kind if fact is not None else 0


def _constant_of(node: NodeProto) -> _Fact:
    """A constant in an attribute that is not a tensor."""
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats"):
            return _Fact(TensorProto.FLOAT, is_static=True)
        if attribute.name in ("value_int", "value_ints"):
            values = [attribute.i] if attribute.name == "value_int" else attribute.ints
            return _Fact(TensorProto.INT64, is_static=True, is_divisor=not {0, -1} & set(values))
    return _Fact(0, is_static=True)


def _constant(tensor: TensorProto) -> _Fact:
    is_divisor = False
    if tensor.data_type not in _FLOATS and tensor.data_type != TensorProto.STRING:
        count = np.prod(tensor.dims, dtype=np.float64)
        if 0 < count <= _MAX_DIVISORS:
            try:
                values = numpy_helper.to_array(tensor)
            except Exception:  # the inspection reports malformed tensors
                values = np.zeros(1)
            is_divisor = bool(values.dtype.kind in "iu" and not np.isin(values, (0, -1)).any())
    return _Fact(tensor.data_type, is_static=True, is_divisor=is_divisor)


def _is_safe_division(node: NodeProto, given: Sequence[_Fact | None]) -> bool:
    if len(given) < 2 or given[0] is None or given[1] is None:
        return False
    if given[0].kind in _FLOATS or given[1].kind in _FLOATS:  # both have the same type
        return True
    return given[1].is_divisor


def _are_static(given: Sequence[_Fact | None], places: Iterable[int]) -> bool:
    return all(place >= len(given) or (fact := given[place]) is None or fact.is_static for place in places)


def _is_forest(node: NodeProto) -> bool:
    """Whether every child comes after its parent in its tree, so that the tree has no cycles."""
    lists = {attribute.name: attribute.ints for attribute in node.attribute}
    names = ("nodes_nodeids", "nodes_truenodeids", "nodes_falsenodeids")
    if any(name not in lists for name in names):
        return False
    ids, yes, no = (np.array(lists[name]) for name in names)
    modes = next((a.strings for a in node.attribute if a.name == "nodes_modes"), ())
    if not len(ids) == len(yes) == len(no) == len(modes):
        return False
    is_inner = np.array([mode != b"LEAF" for mode in modes], dtype=bool)
    return bool(((yes > ids) & (no > ids))[is_inner].all())


def _bodies(node: NodeProto) -> Iterable[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
