"""Rules for recurrent operators, which work along the sequence; the rows are in another dimension."""

from maas_ray.bundle.axis.nodes import GraphNode, resized
from maas_ray.bundle.axis.sizes import BATCH, ONE, Size
from maas_ray.bundle.axis.values import Refusal, Value, unsure

_STATES = {"RNN": (5,), "GRU": (5,), "LSTM": (5, 6)}


def recurrent(node: GraphNode) -> list[Value]:
    """RNN, GRU and LSTM."""
    value = node.data(0)
    node.common(1, 2, 3, 7)
    is_first = bool(node.whole("layout", 0))
    place = 0 if is_first else 1
    if value.axis is None:
        raise unsure("starts from a sequence that is equal for all rows")
    if value.axis != place:
        raise Refusal("processes the rows as a sequence")
    _check(node.maybe(4), 0)
    for index in _STATES[node.op]:
        _check(node.maybe(index), place)
    if value.inner != ONE or value.sizes[place] != BATCH:
        raise unsure("takes rows that are folded into another dimension")
    directions = Size(2 if node.text("direction", "forward") == "bidirectional" else 1)
    hidden = Size(node.whole("hidden_size", 0)) if "hidden_size" in node.attributes else node.name("hidden")
    length = value.sizes[1 if is_first else 0]
    whole = (BATCH, length, directions, hidden) if is_first else (length, directions, BATCH, hidden)
    last = (BATCH, directions, hidden) if is_first else (directions, BATCH, hidden)
    outputs = [resized(value, whole, axis=0 if is_first else 2), resized(value, last, axis=place)]
    return [*outputs, outputs[1]]


def _check(value: Value | None, place: int) -> None:
    """Rejects states and lengths that do not have one entry per row."""
    if value is not None and (
        value.axis != place or value.inner != ONE or value.by_rows or value.is_position or value.by_place
    ):
        raise Refusal("takes states or lengths by the index of a row")


RULES = dict.fromkeys(_STATES, recurrent)
