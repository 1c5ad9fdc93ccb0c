"""Rules for If, Loop and Scan: properties that hold for every branch and every iteration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import AttributeProto, GraphProto

from maas_ray.bundle.axis.sizes import Size, Unknown
from maas_ray.bundle.axis.values import Known, Mixed, Refusal, Value, held, join, unsure

_TURNS = 6
"""Iterations after which the shapes of loop-carried tensors must no longer change."""
_BOOL, _INT64 = 9, 7


@dataclass(frozen=True)
class Control:
    """A node with subgraphs.

    Args:
        op: If, Loop or Scan.
        opset: version of the standard operators.
        inputs: the known inputs; None for an omitted one.
        attributes: by name; those with graphs as they are.
        body: the outputs of a subgraph with these inputs; the last argument tells the subgraphs of a node apart.
        path: unique in the model, from which unknown sizes are named.
    """

    op: str
    opset: int
    inputs: Sequence[Known | None]
    attributes: Mapping[str, AttributeProto]
    body: Callable[[GraphProto, Sequence[Known], str], list[Known]]
    path: str

    def graph(self, name: str) -> GraphProto:
        """A subgraph."""
        return self.attributes[name].g

    def name(self, index: int) -> Callable[[str], Size]:
        """Names the unknown sizes of an output."""
        return lambda key: Size(1, (f"{self.path}{index} {key}",))


def _same(value: Known | None, what: str) -> None:
    """Rejects a condition or a count that depends on a row, or on the number of rows."""
    if value is None:
        return
    if isinstance(value, Mixed):
        raise Refusal(f"computes its {what} from values that mix rows")
    if value.axis is not None:
        raise Refusal(f"takes its {what} from a row, which would apply to all rows")
    if value.by_rows:
        raise Refusal(f"takes its {what} from the number of rows")


def choose(node: Control) -> list[Known]:
    """If."""
    condition = node.inputs[0]
    _same(condition, "condition")
    branches = {name: node.body(node.graph(name), [], name) for name in ("then_branch", "else_branch")}
    if isinstance(condition, Value) and condition.content and isinstance(condition.content[0], Size):
        chosen = condition.content[0]
        if chosen.is_number:
            return branches["then_branch" if chosen.number else "else_branch"]
    pairs = zip(branches["then_branch"], branches["else_branch"], strict=True)
    return [join(first, second, node.name(index)) for index, (first, second) in enumerate(pairs)]


def _settled(
    node: Control, carried: list[Known], turn: Callable[[list[Known]], tuple[list[Known], list[Known]]]
) -> tuple[list[Known], list[Known]]:
    """Repeats an iteration until the carried tensors keep their shapes; returns them and the other outputs."""
    for _ in range(_TURNS):
        after, given = turn(carried)
        joined = [
            join(first, second, node.name(index))
            for index, (first, second) in enumerate(zip(carried, after, strict=True))
        ]
        if joined == carried:
            return carried, given
        carried = joined
    raise unsure("has loop-carried tensors whose shapes do not converge")


def _stacked(value: Known, count: Size, axis: int = 0) -> Known:
    """Adds the dimension of the iterations."""
    if isinstance(value, Mixed):
        return value
    if value.shape is None:
        return replace(value, content=None)
    axis = axis + value.rank + 1 if axis < 0 else axis
    place = value.axis if value.axis is None or value.axis < axis else value.axis + 1
    sizes = (*value.sizes[:axis], count, *value.sizes[axis:])
    return replace(value, shape=sizes, axis=place, content=None, parts=())


def loop(node: Control) -> list[Known]:
    """Loop: the count and the condition must be the same for all rows."""
    count, condition = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    _same(count, "number of iterations")
    _same(condition, "condition")
    number = held((), [Unknown.SAME], _INT64)

    def turn(carried: list[Known]) -> tuple[list[Known], list[Known]]:
        goes_on = held((), [Unknown.SAME], _BOOL)
        outputs = node.body(node.graph("body"), [number, goes_on, *carried], "body")
        _same(outputs[0], "condition")
        return outputs[1 : 1 + len(carried)], outputs[1 + len(carried) :]

    carried, given = _settled(node, [value for value in node.inputs[2:] if value is not None], turn)
    turns = node.name(0)("turns")
    return [*carried, *(_stacked(value, turns) for value in given)]


def scan(node: Control) -> list[Known]:
    """Scan: the rows must not be in the scanned dimension."""
    inputs, attributes = node.inputs, node.attributes
    if node.opset < 9:
        raise unsure("uses the Scan semantics of an operator set before 9")
    num_scanned = attributes["num_scan_inputs"].i
    num_carried = len(inputs) - num_scanned
    axes = list(attributes["scan_input_axes"].ints) if "scan_input_axes" in attributes else [0] * num_scanned
    slices: list[Known] = []
    for value, axis in zip(inputs[num_carried:], axes, strict=True):
        if value is None or isinstance(value, Mixed):
            slices.append(value or Mixed("is omitted", False))
            continue
        axis = axis + value.rank if axis < 0 else axis
        if value.axis == axis:
            raise Refusal(f"iterates over dimension {axis}, across the rows")
        if value.by_rows:
            raise Refusal("uses the number of rows as a value")
        place = value.axis if value.axis is None or value.axis < axis else value.axis - 1
        sizes = tuple(size for each, size in enumerate(value.sizes) if each != axis)
        slices.append(replace(value, shape=sizes, axis=place, content=None, parts=()))

    def turn(carried: list[Known]) -> tuple[list[Known], list[Known]]:
        outputs = node.body(node.graph("body"), [*carried, *slices], "body")
        return outputs[:num_carried], outputs[num_carried:]

    carried, given = _settled(node, [value for value in inputs[:num_carried] if value is not None], turn)
    count = node.name(0)("turns")
    places = list(attributes["scan_output_axes"].ints) if "scan_output_axes" in attributes else [0] * len(given)
    return [*carried, *(_stacked(value, count, axis) for value, axis in zip(given, places, strict=True))]


RULES: Mapping[str, Callable[[Control], list[Known]]] = {"If": choose, "Loop": loop, "Scan": scan}
