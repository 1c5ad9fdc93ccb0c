"""Estimates run times of graphs with free sizes other than rows: one latency curve per form. Independent of engines.

The *form* of a run is its sizes other than its rows. The time of a graph with free sizes may grow with any power of
them (attention: with the square of a length), so a measured form has its own curve, and any other form is estimated
from its two neighbors by size, along the power law through them.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from math import prod

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.latency import LatencyModel
from maas_ray.bundle.format import Signature

Form = tuple[object, ...]
"""Equal for runs whose sizes other than rows are equal."""

MAX_FORMS = 256
"""Maximum number of stored forms, which callers choose. Beyond it the oldest is removed."""
_STEEPEST = 2.0
"""Maximum exponent of the power law for an unknown form."""


def has_free_sizes(signature: Signature) -> bool:
    """Whether an input has a free size other than its number of rows."""
    first = 1 if signature.is_batched else 0
    return any(-1 in tensor.shape[first:] for tensor in signature.inputs)


def form_of(inputs: Mapping[str, Array], *, has_rows: bool) -> Form:
    """The form of tensors, in the signature's order.

    Args:
        inputs: every input.
        has_rows: whether the first dimension counts rows, which are not part of the form.
    """
    if has_rows:
        return tuple([array.shape[1:] for array in inputs.values()])
    return tuple([array.shape for array in inputs.values()])


class FormLatencies:
    """Seconds per run by form and number of rows; the methods of `LatencyModel`, with the form as additional argument.

    The engine's threads may call `record` while the event loop reads: a lost update only loses one run.
    """

    def __init__(self) -> None:
        self._curves: dict[Form, LatencyModel] = {}
        self._by_size: list[tuple[int, Form]] = []
        """Elements per row and form, ascending; replaced, never modified, because another thread may be reading it."""

    def record(self, num_rows: int, seconds: float, form: Form = ()) -> None:
        """Adds one measured run."""
        curve = self._curves.get(form)
        if curve is None:
            curve = self._curves[form] = LatencyModel()
            if len(self._curves) > MAX_FORMS:
                self._curves.pop(next(iter(self._curves)), None)
            by_size = [entry for entry in self._by_size if entry[1] in self._curves]
            insort(by_size, (_size(form), form))
            self._by_size = by_size
        curve.record(num_rows, seconds)

    def has_measured(self, num_rows: int, form: Form = ()) -> bool:
        """Whether a run of this form between the same two powers of two was measured."""
        curve = self._curves.get(form)
        return curve is not None and curve.has_measured(num_rows)

    def estimate_s(self, num_rows: int, form: Form = ()) -> float:
        """Expected seconds of a run; infinity before the first measurement."""
        curve = self._curves.get(form)
        if curve is not None:
            return curve.estimate_s(num_rows)
        size = _size(form)
        known = [
            (entry_size, curve.estimate_s(num_rows))
            for entry_size, entry in _neighbors(self._by_size, size)
            if (curve := self._curves.get(entry)) is not None
        ]
        return _between(known, size)


def _neighbors(by_size: list[tuple[int, Form]], size: int) -> list[tuple[int, Form]]:
    """The nearest form on each side, or the two nearest on one side; ascending."""
    place = bisect_left(by_size, size, key=lambda entry: entry[0])
    first = max(0, min(place - 1, len(by_size) - 2))
    return by_size[first : first + 2]


def _between(known: list[tuple[int, float]], size: int) -> float:
    if not known:
        return math.inf
    low_size, low_s = known[0]
    if len(known) == 1:
        return low_s * max(1.0, size / low_size)
    high_size, high_s = known[1]
    power = 1.0
    if high_size > low_size and low_s > 0 and high_s > 0:
        power = min(max(math.log(high_s / low_s) / math.log(high_size / low_size), 0.0), _STEEPEST)
    if size <= low_size:
        return low_s  # a run has a fixed cost
    if size >= high_size:
        return high_s * math.pow(size / high_size, max(power, 1.0))
    return low_s * math.pow(size / low_size, power)


def _size(form: Form) -> int:
    """Elements per row, at least 1."""
    return max(1, sum(prod(shape) for shape in form if isinstance(shape, tuple)))
