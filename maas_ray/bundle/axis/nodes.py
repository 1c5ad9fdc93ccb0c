"""A node for the rules: its inputs as values, its attributes, and the checks that most rules need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from maas_ray.bundle.axis.sizes import Number, Size, Unknown, depends_on_rows, whole
from maas_ray.bundle.axis.values import Refusal, Sizes, Value, broadcast, unsure


class GraphNode:
    """An application of an operator.

    Args:
        op: name of the operator.
        opset: version of its domain's operators.
        inputs: in order; None for an omitted one.
        attributes: by name.
        num_outputs: number of outputs.
        path: unique in the model, from which unknown sizes are named.
    """

    def __init__(
        self,
        op: str,
        opset: int,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Any],
        num_outputs: int,
        path: str,
    ) -> None:
        self.op = op
        self.opset = opset
        self.inputs = tuple(inputs)
        self.attributes = attributes
        self.num_outputs = num_outputs
        self._path = path

    def name(self, key: str) -> Size:
        """An unknown size that is the same for every caller."""
        return Size(1, (f"{self._path} {key}",))

    def whole(self, name: str, default: int) -> int:
        """An attribute."""
        return int(self.attributes.get(name, default))

    def ints(self, name: str) -> list[int] | None:
        """An attribute; None if it is omitted."""
        found = self.attributes.get(name)
        return None if found is None else [int(each) for each in found]

    def text(self, name: str, default: str = "") -> str:
        """An attribute."""
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else str(found)

    def maybe(self, index: int) -> Value | None:
        """An input, if it is given."""
        return self.inputs[index] if index < len(self.inputs) else None

    def input(self, index: int) -> Value:
        """An input.

        Raises:
            Refusal: it is omitted.
        """
        found = self.maybe(index)
        if found is None:
            raise unsure(f"has no input {index}")
        return found

    def data(self, index: int = 0) -> Value:
        """An input as data, not as sizes.

        Raises:
            Refusal: its elements depend on the number of rows, or on the index of a row.
        """
        found = self.input(index)
        if found.by_rows:
            raise Refusal("uses the number of rows as a value")
        if found.is_position or found.by_place or any(found.parts):
            raise Refusal("uses the index of a row in the run as a value")
        return found

    def common(self, *indices: int) -> None:
        """Rejects rows, and values that depend on their number, in these inputs if they are given."""
        for index in indices:
            found = self.maybe(index)
            if found is not None and not found.is_common:
                raise unsure(f"takes rows as input {index}, for which there is no rule")

    def numbers(self, index: int) -> tuple[Number, ...] | None:
        """The elements of an input with sizes, axes or the like; None if it is omitted or they are unknown.

        Raises:
            Refusal: it contains rows.
        """
        found = self.maybe(index)
        if found is None:
            return None
        if found.axis is not None:
            raise Refusal("takes a size or an index from a row, which would apply to all rows")
        return found.numbers

    def known(self, index: int) -> list[int] | None:
        """As `numbers`, if all of them are plain integers; None if the input is omitted.

        Raises:
            Refusal: they are not.
        """
        if self.maybe(index) is None:
            return None
        numbers = self.numbers(index)
        found = None if numbers is None else [whole(number) for number in numbers]
        if found is None or any(each is None for each in found):
            raise unsure(f"computes its axes or indices (input {index}) at run time")
        return [each for each in found if each is not None]

    def size(self, number: Number, key: str) -> Size:
        """An element of a shape as a size.

        Raises:
            Refusal: it depends on the number of rows in an unknown way.
        """
        if isinstance(number, Size):
            return number
        if number is Unknown.BY_ROWS:
            raise Refusal("computes a size from the number of rows")
        return self.name(key)

    def apart(self, value: Value, axis: int) -> int:
        """Normalizes an axis that the operator works along.

        Raises:
            Refusal: the rows are in that dimension.
        """
        axis = axis + value.rank if axis < 0 else axis
        if axis == value.axis:
            raise Refusal(f"operates along dimension {axis}, across the rows")
        return axis

    def before(self, value: Value, axis: int) -> int:
        """Normalizes an axis, from which on the operator works along all dimensions.

        Raises:
            Refusal: the rows are in one of those dimensions.
        """
        axis = axis + value.rank if axis < 0 else axis
        if value.axis is not None and value.axis >= axis:
            raise Refusal(f"operates along the dimensions from {axis} on, across the rows")
        return axis

    def leading(self, value: Value) -> Value:
        """Rejects rows that are not in the first dimension of a value."""
        if value.axis not in (None, 0):
            raise Refusal(f"operates along dimension {value.axis}, across the rows")
        return value

    def broadcast(self, *values: Value) -> Value:
        """Sizes and rows of an elementwise result; see `values.broadcast`."""
        return broadcast(values, self.name)

    def refuse_sized(self, numbers: Sequence[Number]) -> None:
        """Rejects numbers that depend on the number of rows."""
        if any(map(depends_on_rows, numbers)):
            raise Refusal("uses the number of rows as a value")


def resized(value: Value, sizes: Sequence[Size], *, axis: int | None = None) -> Value:
    """The same rows in another shape; `axis`: their new dimension, if it differs."""
    return replace(value, shape=tuple(sizes), axis=value.axis if axis is None else axis, content=None, parts=())


def typed(value: Value, dtype: int) -> Value:
    """The same value with another datatype."""
    return replace(value, dtype=dtype)


def plain(value: Value) -> Value:
    """The same sizes and rows, without known elements."""
    return replace(value, content=None, parts=(), is_position=False)


def cut(sizes: Sizes, axis: int) -> list[Size]:
    """The sizes without one dimension."""
    return [size for place, size in enumerate(sizes) if place != axis]


Rule = Callable[[GraphNode], list[Value]]
"""Derives the properties of a node's outputs; raises `Refusal` if its rows are not known to be independent."""
