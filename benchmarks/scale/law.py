"""A straight line through measured points, and the points and the line as Markdown. Measures nothing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Law(NamedTuple):
    """`a + b·n`, and how well it fits."""

    a: float
    b: float
    worst: float
    """Largest distance of a point from the line, as a share of the largest value."""

    def at(self, n: float) -> float:
        """The value for `n`."""
        return self.a + self.b * n


def fit(points: Iterable[tuple[float, float]]) -> Law:
    """The line of least squares.

    Args:
        points: `(n, value)`, at least two with different `n`.

    Raises:
        ValueError: there are fewer.
    """
    found = list(points)
    if len({n for n, _ in found}) < 2:
        raise ValueError(f"a line needs two points with different n; there are {found}")
    n, value = np.array(found, dtype=float).T
    b, a = np.polyfit(n, value, 1)
    largest = float(np.abs(value).max()) or 1.0
    return Law(float(a), float(b), float(np.abs(a + b * n - value).max()) / largest)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers with three digits."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(map(shown, row))} |" for row in rows]
    return "\n".join(lines)


def laws(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """A line of text with the law of each column but the first, which is `n`."""
    texts = []
    for index, name in enumerate(columns[1:], start=1):
        found = fit((row[0], row[index]) for row in rows)
        texts.append(f"{name} = {shown(found.a)} + {shown(found.b)}·n (±{found.worst:.0%})")
    return f"n = {columns[0]}: {'; '.join(texts)}"


def shown(value: object) -> str:
    """Three digits of a number."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
