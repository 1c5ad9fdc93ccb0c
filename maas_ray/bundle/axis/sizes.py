"""Sizes that are known, named or a product of both, and what a small tensor of such sizes holds. Knows no operator.

A size is a monomial: a whole number times named unknowns, one of which is the number of rows, `ROWS`. Products, and
quotients that come out even, are exact; everything else about a size is unknown but for one thing: whether it depends
on the number of rows.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

ROWS = "#rows"
"""The name of the number of rows; no name in a graph begins like this."""


@dataclass(frozen=True, slots=True)
class Size:
    """`number` times the product of `names` (sorted, a name once per power)."""

    number: int
    names: tuple[str, ...] = ()

    @property
    def is_number(self) -> bool:
        """Whether nothing about it is unknown."""
        return not self.names

    @property
    def num_rows(self) -> int:
        """The power of the number of rows in it."""
        return self.names.count(ROWS)

    def times(self, other: "Size") -> "Size":
        """The product."""
        return product((self, other))

    def over(self, other: "Size") -> "Size | None":
        """The quotient, if it is a size; None where it does not come out even, or by names that are not in it."""
        if not other.number or self.number % other.number:
            return None
        rest = Counter(self.names)
        rest.subtract(other.names)
        if min(rest.values(), default=0) < 0:
            return None
        return Size(self.number // other.number, tuple(sorted(rest.elements())))


ONE = Size(1)
BATCH = Size(1, (ROWS,))


def product(sizes: Iterable[Size]) -> Size:
    """The product of all; 1 of none."""
    number = 1
    names: list[str] = []
    for size in sizes:
        number *= size.number
        names += size.names
    return Size(number, tuple(sorted(names)) if number else ())


class Unknown(Enum):
    """A number that is not known."""

    SAME = "same"
    """It is the same whatever the number of rows."""
    BY_ROWS = "by rows"
    """It may depend on the number of rows."""


Number = Size | float | Unknown
"""An element of a small tensor: an integer or boolean as a size, a fraction, or unknown."""


def depends_on_rows(number: Number) -> bool:
    """Whether it may differ with the number of rows."""
    return number is Unknown.BY_ROWS or (isinstance(number, Size) and number.num_rows > 0)


def unknown(*numbers: Number) -> Unknown:
    """What is known of a number that was computed of these in a way that keeps nothing else."""
    return Unknown.BY_ROWS if any(map(depends_on_rows, numbers)) else Unknown.SAME


def whole(number: Number) -> int | None:
    """The integer, if it is known."""
    return number.number if isinstance(number, Size) and number.is_number else None
