"""How large a graph is once its functions are put in place, counted without doing that. Runs nothing.

onnxruntime puts the body of a function where each call is. Functions that call each other twice double the graph at each
level, so 1.5 KB of them can stand for 16 million nodes.
"""

from collections.abc import Iterable

from onnx import AttributeProto, ModelProto, NodeProto

from maas_ray.bundle.graph.functions import function_of
from maas_ray.errors import BundleError

MAX_NODES = 100_000
"""Nodes with all functions in place. onnxruntime makes a session of so many in some 10 s; a model of 100 layers has some
thousands."""
MAX_ENDS = 4096
"""Inputs and outputs together; onnxruntime's time for them grows faster than their number."""


def check_extent(model: ModelProto) -> None:
    """Checks that a session can be made of a graph in reasonable time.

    Args:
        model: whose functions do not call themselves (`check_functions`).

    Raises:
        BundleError: it has too many nodes, inputs or outputs; the message says how many.
    """
    num_ends = len(model.graph.input) + len(model.graph.output)
    if num_ends > MAX_ENDS:
        raise BundleError(
            f"the graph has {num_ends} inputs and outputs, at most {MAX_ENDS} are served; put columns into one tensor"
        )
    num_nodes = _count(model)
    if num_nodes > MAX_NODES:
        raise BundleError(
            f"the graph has {num_nodes} nodes once its functions are put in place, at most {MAX_NODES} are served; "
            "export it with loops or with fewer layers"
        )


def _count(model: ModelProto) -> int:
    """Nodes of the main graph with all functions in place."""
    bodies = {(f.domain, f.name, f.overload): f.node for f in model.functions}
    own: dict[tuple[str, str, str], int] = {}
    calls: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for key, nodes in bodies.items():
        flat = list(_all(nodes))
        calls[key] = [function_of(node) for node in flat if function_of(node) in bodies]
        own[key] = len(flat) - len(calls[key])
    known: dict[tuple[str, str, str], int] = {}
    for start in bodies:  # callees first, without recursion of our own: a chain of functions may be long
        waiting = [start]
        while waiting:
            key = waiting[-1]
            missing = [callee for callee in calls[key] if callee not in known]
            if missing:
                waiting.extend(dict.fromkeys(missing))
            else:
                known[key] = own[key] + sum(known[callee] for callee in calls[key])
                waiting.pop()
    total = 0
    for node in _all(model.graph.node):
        total += known.get(function_of(node), 1)
    return total


def _all(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    """Nodes, and those of the bodies of loops and conditions."""
    waiting = [iter(nodes)]
    while waiting:
        for node in waiting[-1]:
            yield node
            inner = [
                body.node
                for attribute in node.attribute
                for body in ([attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs)
            ]
            if inner:
                waiting.extend(iter(body) for body in inner)
                break
        else:
            waiting.pop()
