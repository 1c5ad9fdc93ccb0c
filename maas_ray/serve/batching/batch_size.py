"""How many rows a run may have so that deadlines are kept. Knows items and expected seconds; no queue and no tenant."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

HEADROOM = 1.25
"""A run is planned to take so many times its estimate, where a deadline depends on it."""

Estimate = Callable[[int], float]
"""Expected seconds of a run by its rows."""


class Timed(Protocol):
    """What has to be run by a deadline."""

    num_rows: int
    deadline: float


def is_too_much(items: Iterable[Timed], most: int, now: float, estimate_s: Estimate) -> bool:
    """Whether one of these items would be late if they were run in full batches, the earliest deadline first.

    Args:
        items: each on time if it were run alone, now.
        most: rows of a full batch.
        now: time on the clock of the deadlines.
        estimate_s: as `LatencyModel.estimate_s`.
    """
    full_s = HEADROOM * estimate_s(most)
    num_rows = 0
    for item in sorted(items, key=lambda item: item.deadline):
        num_rows += item.num_rows
        needed_s = full_s * num_rows / most if num_rows > most else HEADROOM * estimate_s(num_rows)
        if num_rows > item.num_rows and now + needed_s > item.deadline:
            return True
    return False


def largest_on_time(items: Sequence[Timed], most: int, now: float, estimate_s: Estimate) -> tuple[int, float]:
    """Rows of the largest run all of whose items are on time, and the earliest deadline that it keeps.

    Args:
        items: at least one, each on time if it were run alone, now.
        most: rows of a full batch; one item may have more.
        now: time on the clock of the deadlines.
        estimate_s: as `LatencyModel.estimate_s`.
    """
    latest_first = sorted(items, key=lambda item: -item.deadline)
    num_rows, earliest = latest_first[0].num_rows, latest_first[0].deadline
    for item in latest_first[1:]:
        more = num_rows + item.num_rows
        if more > most or now + HEADROOM * estimate_s(more) > item.deadline:
            break
        num_rows, earliest = more, item.deadline
    return num_rows, min(earliest, now + HEADROOM * estimate_s(num_rows))
