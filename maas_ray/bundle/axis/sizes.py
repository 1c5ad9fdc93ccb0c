"""Symbolic sizes: known numbers, names or products of both, and elements of small tensors. Independent of operators.

A size is a monomial: an integer times named unknowns, one of which is the number of rows, `ROWS`. Products, and
quotients without remainder, are exact; of every other result only one property is known: whether it depends on the
number of rows.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

ROWS = "#rows"
"""The name of the number of rows; no name in a graph has this prefix."""


@dataclass(frozen=True, slots=True)
class Size:
    """`number` times the product of `names` (sorted, a name once per power)."""

    number: int
    names: tuple[str, ...] = ()

    @property
    def is_number(self) -> bool:
        """Whether it is a known number."""
        return not self.names

    @property
    def num_rows(self) -> int:
        """The exponent of the number of rows."""
        return self.names.count(ROWS)

    def times(self, other: "Size") -> "Size":
        """The product."""
        return product((self, other))

    def over(self, other: "Size") -> "Size | None":
        """The quotient, if it is a size; None if there is a remainder, or the divisor has other names."""
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
    """The product of all sizes; 1 for no sizes."""
    number = 1
    names: list[str] = []
    for size in sizes:
        number *= size.number
        names += size.names
    return Size(number, tuple(sorted(names)) if number else ())


class Unknown(Enum):
    """A number that is not known."""

    SAME = "same"
    """It does not depend on the number of rows."""
    BY_ROWS = "by rows"
    """It may depend on the number of rows."""


Number = Size | float | Unknown
"""An element of a small tensor: an integer or boolean as a size, a fraction, or unknown."""


def depends_on_rows(number: Number) -> bool:
    """Whether it may depend on the number of rows."""
    return number is Unknown.BY_ROWS or (isinstance(number, Size) and number.num_rows > 0)


def unknown(*numbers: Number) -> Unknown:
    """The unknown result of a computation with these numbers."""
    return Unknown.BY_ROWS if any(map(depends_on_rows, numbers)) else Unknown.SAME


def whole(number: Number) -> int | None:
    """The integer, if it is known."""
    return number.number if isinstance(number, Size) and number.is_number else None
