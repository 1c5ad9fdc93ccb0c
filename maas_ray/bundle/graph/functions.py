"""Checks the local functions of an ONNX graph: only in domains that no runtime owns, defined once, not recursive.

onnxruntime runs its own kernel for a node with the name of one of its operators, and ignores a local function of that
name. So a function in such a domain could bypass the list of supported operators.
"""

from collections.abc import Iterable, Iterator, Mapping

from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto

from maas_ray.errors import BundleError

RUNTIME_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms", "org.pytorch.aten", "com.intel.ai", "com.xilinx", "com.amd")
"""Domains of ONNX and onnxruntime (its constants `k*Domain`), each with all subdomains; the empty domain belongs to
them too. A name that is unused there today may be an operator of the next version."""

Key = tuple[str, str, str]
"""Domain, name and overload of a function."""


def check_functions(model: ModelProto) -> frozenset[Key]:
    """Checks the local functions of a model.

    Args:
        model: the decoded, unchecked model.

    Returns:
        The functions that nodes may call.

    Raises:
        BundleError: a function is in a runtime's domain, is defined twice, or is recursive.
    """
    functions: dict[Key, FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if is_of_runtime(function.domain):
            raise BundleError(
                f"the graph defines the function {_shown(key)} in a domain of ONNX or onnxruntime, where it could hide "
                "an operator; export it in another domain"
            )
        if key in functions:
            raise BundleError(f"the graph defines the function {_shown(key)} twice; export it again")
        functions[key] = function
    _refuse_recursion({key: [*_calls(function.node, functions)] for key, function in functions.items()})
    return frozenset(functions)


def is_of_runtime(domain: str) -> bool:
    """Whether ONNX or onnxruntime defines, or may define in the future, operators in a domain."""
    name = domain.lower()
    return not name or any(name == owned or name.startswith(f"{owned}.") for owned in RUNTIME_DOMAINS)


def function_of(node: NodeProto) -> Key:
    """The key of the function that a node calls, if it exists."""
    return (node.domain, node.op_type, node.overload)


def _calls(nodes: Iterable[NodeProto], functions: Mapping[Key, FunctionProto]) -> Iterator[Key]:
    """Functions that nodes call, also in the bodies of loops and conditions."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if function_of(node) in functions:
            yield function_of(node)
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            waiting += [inner for body in bodies for inner in body.node]


def _refuse_recursion(calls: Mapping[Key, list[Key]]) -> None:
    # Repeatedly takes functions whose callees are all done (Kahn's algorithm): no recursion here at any depth.
    callers: dict[Key, list[Key]] = {key: [] for key in calls}
    num_open = {key: len(callees) for key, callees in calls.items()}
    for key, callees in calls.items():
        for callee in callees:
            callers[callee].append(key)
    done = [key for key, count in num_open.items() if not count]
    for key in done:  # grows during the iteration
        for caller in callers[key]:
            num_open[caller] -= 1
            if not num_open[caller]:
                done.append(caller)
    if len(done) < len(calls):
        key = next(key for key, count in num_open.items() if count)
        raise BundleError(f"the function {_shown(key)} calls itself, directly or through others; export it unrolled")


def _shown(key: Key) -> str:
    domain, name, overload = key
    return repr(f"{domain}::{name}" + (f"::{overload}" if overload else ""))[:200]
