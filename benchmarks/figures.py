"""Medians, spread and what must be reached, as Markdown. Measures nothing."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_FOREIGN_CPUS = 0.2
"""Above it a table warns: whoever is measured shares its CPUs with something else."""
Results = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest of what it is the median of."""

    median: float
    least: float
    greatest: float
    count: int

    def text(self, format_one: Callable[[float], str]) -> str:
        """`median (least–greatest)`."""
        return f"{format_one(self.median)} ({format_one(self.least)}–{format_one(self.greatest)})"


@dataclass(frozen=True)
class Figure:
    """One line of what must be reached."""

    name: str
    at_least: float
    aim: float
    find: Callable[[Results], Spread | None]
    is_upper_bound: bool = False
    """True: smaller is better."""
    scale: float = 1.0
    """Factor for showing."""
    unit: str = ""

    def verdict(self, value: float) -> str:
        """`aim`, `reached` or `missed`."""
        sign = -1 if self.is_upper_bound else 1
        if sign * value >= sign * self.aim:
            return "aim"
        return "reached" if sign * value >= sign * self.at_least else "missed"


def spread(values: Iterable[float]) -> Spread | None:
    """None without values."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found), len(found)) if found else None


def median_interval(values: Iterable[float], share: float = 0.95) -> tuple[float, float]:
    """Where the true median is with this probability, whatever the distribution: by the binomial one of how many of the
    values are below it. Fewer than six values cannot say so at 0.95: their least and greatest.
    """
    ordered = sorted(values)
    num_cut, chance = 0, 0.5 ** len(ordered)  # that at most `num_cut` of the values are below the median
    while 2 * chance <= 1 - share and num_cut < len(ordered) // 2:
        num_cut += 1
        chance += math.comb(len(ordered), num_cut) * 0.5 ** len(ordered)
    cut = max(0, num_cut - 1)
    return ordered[cut], ordered[-1 - cut]


def must_reach(figures: Iterable[Figure], results: Results) -> str:
    """The table of those figures that were measured."""
    lines = ["| figure | at least | aim | measured | |", "|---|---|---|---|---|"]
    for figure in figures:
        found = figure.find(results)
        if found is None:
            continue

        def show(value: float, figure: Figure = figure) -> str:
            return f"{value * figure.scale:.3g}{figure.unit}"

        sign = "≤ " if figure.is_upper_bound else ""
        limits = f"{sign}{show(figure.at_least)} | {sign}{show(figure.aim)}"
        lines.append(f"| {figure.name} | {limits} | {found.text(show)} | {figure.verdict(found.median)} |")
    return "\n".join(lines)
