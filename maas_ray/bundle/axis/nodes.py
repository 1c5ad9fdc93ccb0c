"""One node as the rules see it: its inputs as values, its attributes, and checks that most rules begin with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from maas_ray.bundle.axis.sizes import Number, Size, Unknown, depends_on_rows, whole
from maas_ray.bundle.axis.values import Refusal, Sizes, Value, broadcast, unsure


class GraphNode:
    """An application of an operator.

    Args:
        op: its name.
        opset: version of its domain's operators.
        inputs: in order; None for one that is left out.
        attributes: by name.
        num_outputs: how many it has.
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
        """An attribute; None if it is left out."""
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
            Refusal: it is left out.
        """
        found = self.maybe(index)
        if found is None:
            raise unsure(f"has no input number {index}")
        return found

    def data(self, index: int = 0) -> Value:
        """An input as numbers to compute with, not as sizes.

        Raises:
            Refusal: its elements depend on the number of rows, or on the place of a row.
        """
        found = self.input(index)
        if found.by_rows:
            raise Refusal("uses the number of rows as a value")
        if found.is_position or found.by_place or any(found.parts):
            raise Refusal("uses the place of a row in the run as a value")
        return found

    def common(self, *indices: int) -> None:
        """Refuses rows, and what depends on their number, in these inputs where they are given."""
        for index in indices:
            found = self.maybe(index)
            if found is not None and not found.is_common:
                raise unsure(f"takes rows as input number {index}, for which no rule is known")

    def numbers(self, index: int) -> tuple[Number, ...] | None:
        """The elements of an input that says sizes, axes or the like; None if it is left out or they are not known.

        Raises:
            Refusal: it holds rows.
        """
        found = self.maybe(index)
        if found is None:
            return None
        if found.axis is not None:
            raise Refusal("takes a size or a place from a row, which would hold for all of them")
        return found.numbers

    def known(self, index: int) -> list[int] | None:
        """As `numbers`, where all of them are plain integers; None if the input is left out.

        Raises:
            Refusal: they are not.
        """
        if self.maybe(index) is None:
            return None
        numbers = self.numbers(index)
        found = None if numbers is None else [whole(number) for number in numbers]
        if found is None or any(each is None for each in found):
            raise unsure(f"computes its axes or places (input number {index}) while it runs")
        return [each for each in found if each is not None]

    def size(self, number: Number, key: str) -> Size:
        """An element of a shape as a size.

        Raises:
            Refusal: it depends on the number of rows in a way that is not known.
        """
        if isinstance(number, Size):
            return number
        if number is Unknown.BY_ROWS:
            raise Refusal("makes a size out of the number of rows")
        return self.name(key)

    def apart(self, value: Value, axis: int) -> int:
        """Normalizes an axis that is worked along.

        Raises:
            Refusal: the rows are in that dimension.
        """
        axis = axis + value.rank if axis < 0 else axis
        if axis == value.axis:
            raise Refusal(f"works along dimension {axis}, across the rows")
        return axis

    def before(self, value: Value, axis: int) -> int:
        """Normalizes an axis from which on all dimensions are worked along.

        Raises:
            Refusal: the rows are in one of those.
        """
        axis = axis + value.rank if axis < 0 else axis
        if value.axis is not None and value.axis >= axis:
            raise Refusal(f"works along the dimensions from {axis} on, across the rows")
        return axis

    def leading(self, value: Value) -> Value:
        """Refuses rows that are not in the first dimension of a value."""
        if value.axis not in (None, 0):
            raise Refusal(f"works along dimension {value.axis}, across the rows")
        return value

    def broadcast(self, *values: Value) -> Value:
        """Sizes and rows of an elementwise result; see `values.broadcast`."""
        return broadcast(values, self.name)

    def refuse_sized(self, numbers: Sequence[Number]) -> None:
        """Refuses numbers that depend on how many rows there are."""
        if any(map(depends_on_rows, numbers)):
            raise Refusal("uses the number of rows as a value")


def resized(value: Value, sizes: Sequence[Size], *, axis: int | None = None) -> Value:
    """The same rows in another shape; `axis` where they are in another dimension than before."""
    return replace(value, shape=tuple(sizes), axis=value.axis if axis is None else axis, content=None, parts=())


def typed(value: Value, dtype: int) -> Value:
    """The same with another datatype."""
    return replace(value, dtype=dtype)


def plain(value: Value) -> Value:
    """The same sizes and rows, without what is known of the elements."""
    return replace(value, content=None, parts=(), is_position=False)


def cut(sizes: Sizes, axis: int) -> list[Size]:
    """The sizes without one dimension."""
    return [size for place, size in enumerate(sizes) if place != axis]


Rule = Callable[[GraphNode], list[Value]]
"""What is known of the outputs of a node; raises `Refusal` where its rows are not known to be kept apart."""
