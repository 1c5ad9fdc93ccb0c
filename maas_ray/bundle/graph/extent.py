"""Computes the size of a graph with all functions inlined, without inlining them.

onnxruntime inlines the body of a function at each call. Functions that call each other twice double the graph at each
level, so 1.5 KB of them can expand to 16 million nodes.
"""

from collections.abc import Iterable

from onnx import AttributeProto, ModelProto, NodeProto

from maas_ray.bundle.graph.functions import function_of
from maas_ray.errors import BundleError

MAX_NODES = 100_000
"""Maximum nodes with all functions inlined. onnxruntime creates a session with this many in about 10 s; a model of 100
layers has a few thousand."""
MAX_ENDS = 4096
"""Maximum number of inputs and outputs together; onnxruntime's time for them grows faster than their number."""


def check_extent(model: ModelProto) -> None:
    """Checks that a session can be created from a graph in reasonable time.

    Args:
        model: a model without recursive functions (`check_functions`).

    Raises:
        BundleError: it has too many nodes, inputs or outputs; the message contains the number.
    """
    num_ends = len(model.graph.input) + len(model.graph.output)
    if num_ends > MAX_ENDS:
        raise BundleError(
            f"the graph has {num_ends} inputs and outputs; the limit is {MAX_ENDS}; combine columns into one tensor"
        )
    num_nodes = count_nodes(model)
    if num_nodes > MAX_NODES:
        raise BundleError(
            f"the graph has {num_nodes} nodes with its functions inlined; the limit is {MAX_NODES}; "
            "export it with loops or with fewer layers"
        )


def count_nodes(model: ModelProto) -> int:
    """Number of nodes of the main graph with all functions inlined."""
    bodies = {(f.domain, f.name, f.overload): f.node for f in model.functions}
    own: dict[tuple[str, str, str], int] = {}
    calls: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for key, nodes in bodies.items():
        flat = list(_all(nodes))
        calls[key] = [function_of(node) for node in flat if function_of(node) in bodies]
        own[key] = len(flat) - len(calls[key])
    known: dict[tuple[str, str, str], int] = {}
    for start in bodies:  # callees first, without recursion here: a chain of functions may be long
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
