"""Abstract values of tensors in the analysis: sizes, and the dimension of the rows. Independent of operators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from maas_ray.bundle.axis.sizes import BATCH, ONE, Number, Size, Unknown, depends_on_rows

Sizes = tuple[Size, ...]
MAX_KNOWN = 64
"""Maximum elements of a tensor whose numbers are tracked: sizes, axes, pads and scales are that small."""


class Refusal(Exception):
    """An operator is not known to keep rows apart.

    Args:
        text: description, as the end of a sentence that begins with the node.
        is_across: whether it is known to compute across rows; otherwise nothing is known.
    """

    def __init__(self, text: str, *, is_across: bool = True) -> None:
        super().__init__(text)
        self.text = text
        self.is_across = is_across


def unsure(text: str) -> Refusal:
    """A refusal because of missing knowledge."""
    return Refusal(text, is_across=False)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that is the same for every caller, or contains rows, or depends on the number of rows.

    If it contains rows, element `i` of dimension `axis` belongs to row `(i // inner) % ROWS`, and depends on no other
    row. Sizes without the number of rows are the same for requests that share a run.
    """

    shape: Sizes | None = None
    """None: even the rank is unknown."""
    axis: int | None = None
    """The dimension of the rows; None: it contains no rows."""
    inner: Size = ONE
    content: tuple[Number, ...] | None = None
    """The elements of a small tensor without rows, in order."""
    by_rows: bool = False
    """It contains no rows, but its elements may depend on the number of rows: valid as sizes, not as data."""
    dtype: int = 0
    """`TensorProto.DataType`; 0 is unknown."""
    is_position: bool = False
    """Each row contains its own index, counted from 0: valid for gathering rows, not as data."""
    by_place: bool = False
    """Its elements were computed from the indices of rows: its shape is valid, its elements are not."""
    parts: tuple[bool, ...] = ()
    """For indices, by component: whether it is the row's own index."""

    @property
    def is_common(self) -> bool:
        """Whether it is the same for every caller and every number of rows."""
        return self.axis is None and not self.by_rows

    @property
    def rank(self) -> int:
        """The number of dimensions.

        Raises:
            Refusal: it is not known.
        """
        return len(self.sizes)

    @property
    def sizes(self) -> Sizes:
        """The shape.

        Raises:
            Refusal: it is not known.
        """
        if self.shape is None:
            raise unsure("takes a tensor of unknown rank")
        return self.shape

    @property
    def numbers(self) -> tuple[Number, ...] | None:
        """The elements of a small tensor without rows; None if even their count is unknown."""
        if self.content is not None or self.axis is not None or self.shape is None:
            return self.content
        count = 1
        for size in self.shape:
            if not size.is_number:
                return None
            count *= size.number
        found = Unknown.BY_ROWS if self.by_rows else Unknown.SAME
        return (found,) * count if count <= MAX_KNOWN else None


@dataclass(frozen=True, slots=True)
class Mixed:
    """A tensor whose elements may depend on several rows, and the reason."""

    reason: str
    is_across: bool


Known = Value | Mixed


def held(shape: Sequence[Size], content: Sequence[Number] | None, dtype: int = 0) -> Value:
    """A tensor without rows, by its elements."""
    kept = tuple(content) if content is not None and len(content) <= MAX_KNOWN else None
    return Value(tuple(shape), content=kept, by_rows=any(map(depends_on_rows, content or ())), dtype=dtype)


def spread(shape: Sequence[Size], dtype: int = 0) -> Value:
    """A tensor filled with one number; if its shape contains the number of rows, each row has its part.

    Raises:
        Refusal: the number of rows is in it more than once.
    """
    axes = [axis for axis, size in enumerate(shape) if size.num_rows]
    if not axes:
        return Value(tuple(shape), dtype=dtype)
    inner = shape[axes[0]].over(BATCH)
    if len(axes) > 1 or inner is None or inner.num_rows:
        raise Refusal("creates a tensor whose size grows with the square of the number of rows")
    return Value(tuple(shape), axes[0], inner, dtype=dtype)


Namer = Callable[[str], Size]
"""Names an unknown size of a node: the same name for the same key."""


def broadcast(values: Sequence[Value], name: Namer) -> Value:
    """The sizes and rows of elementwise results, with NumPy's broadcasting.

    Raises:
        Refusal: an element of the result would depend on several rows, or on the index of a row in the run.
    """
    with_rows = [value for value in values if value.axis is not None]
    if any(value.shape is None for value in values):
        if with_rows:
            raise unsure("combines rows with a tensor of unknown rank")
        return Value()
    rank = max(value.rank for value in values)
    if with_rows and any(value.by_rows for value in values):
        raise Refusal("uses the number of rows as a value")
    by_place = any(value.is_position or value.by_place for value in with_rows)
    places = {(value.axis or 0) + rank - value.rank for value in with_rows}
    if len(places) > 1:
        raise Refusal("combines each row with every other: they are in different dimensions of its inputs")
    shape = []
    for place in range(rank):
        sizes = {value.sizes[place - rank + value.rank] for value in values if place >= rank - value.rank}
        if place in places:
            sizes.discard(ONE)
            if len(sizes) > 1:
                shown = ", ".join(str(size.number) for size in sizes if size.is_number)
                raise Refusal(
                    f"broadcasts a tensor {f'of {shown} entries ' if shown else ''}over the rows by their index"
                )
            shape.append(sizes.pop())
        else:
            shape.append(_joint(sizes, partial(name, f"broadcast {place}")))
    if not with_rows:
        return Value(tuple(shape))
    # A run may have one row, so a size of 1 must not be confused with the dimension of the rows.
    if any(value.axis is None and _reaches(value, rank, places) for value in values):
        raise Refusal("broadcasts a tensor over the rows by their index")
    inner = {value.inner for value in with_rows}
    if len(inner) > 1:
        raise Refusal("combines rows that are laid out differently")
    return Value(tuple(shape), places.pop(), inner.pop(), by_place=by_place)


def _reaches(value: Value, rank: int, places: set[int]) -> bool:
    """Whether a tensor without rows has more than one entry in the dimension of the rows."""
    return any(place >= rank - value.rank and value.sizes[place - rank + value.rank] != ONE for place in places)


def _joint(sizes: set[Size], other: Callable[[], Size]) -> Size:
    sizes.discard(ONE)
    if len(sizes) <= 1:
        return sizes.pop() if sizes else ONE
    large = [size for size in sizes if size.is_number and size.number > 1]
    if len(large) == 1 and len(sizes) == len(large) + sum(not size.is_number for size in sizes):
        return large[0]
    return other()


def join(first: Known, second: Known, name: Namer) -> Known:
    """The common properties of two tensors: the results of two branches, or of two iterations of a loop."""
    if isinstance(first, Mixed) or first == second:
        return first
    if isinstance(second, Mixed):
        return second
    marks = [(value.axis, value.inner, value.is_position, value.by_place) for value in (first, second)]
    if marks[0] != marks[1]:
        return Mixed("contains rows in one case, but not, or in another dimension, in another case", is_across=False)
    by_rows = first.by_rows or second.by_rows
    if first.shape is None or second.shape is None or first.rank != second.rank:
        if first.axis is not None:
            return Mixed("has different ranks in different cases", is_across=False)
        return Value(by_rows=by_rows, dtype=first.dtype)
    shape = tuple(
        a if a == b else name(f"join {axis}") for axis, (a, b) in enumerate(zip(first.shape, second.shape, strict=True))
    )
    if first.axis is not None and shape[first.axis] != first.shape[first.axis]:
        return Mixed("has different numbers of rows in different cases", is_across=False)
    return replace(first, shape=shape, content=None, by_rows=by_rows, parts=())
