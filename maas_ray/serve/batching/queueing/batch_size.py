"""Batch size: how many rows a run may have so that every deadline is met. Independent of queues and tenants."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

HEADROOM = 1.25
"""Where a deadline depends on a run, the run is planned to take this multiple of its estimate."""

Estimate = Callable[[int], float]
"""Maps the number of rows to the expected seconds of a run."""


class Timed(Protocol):
    """A work item with a deadline."""

    num_rows: int
    deadline: float


def is_too_much(items: Iterable[Timed], most: int, now: float, estimate_s: Estimate) -> bool:
    """Returns whether an item would be late if all were run in full batches, earliest deadline first.

    Args:
        items: items that would each be on time if run alone, now.
        most: rows of a full batch.
        now: current time, on the clock of the deadlines.
        estimate_s: see `LatencyModel.estimate_s`.
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
    """Returns the rows of the largest run that has all its items on time, and the earliest deadline it meets.

    Args:
        items: at least one; each would be on time if run alone, now.
        most: rows of a full batch; one item may have more.
        now: current time, on the clock of the deadlines.
        estimate_s: see `LatencyModel.estimate_s`.
    """
    latest_first = sorted(items, key=lambda item: -item.deadline)
    num_rows, earliest = latest_first[0].num_rows, latest_first[0].deadline
    for item in latest_first[1:]:
        more = num_rows + item.num_rows
        if more > most or now + HEADROOM * estimate_s(more) > item.deadline:
            break
        num_rows, earliest = more, item.deadline
    return num_rows, min(earliest, now + HEADROOM * estimate_s(num_rows))
