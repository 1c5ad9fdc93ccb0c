"""Estimates the time of a run of n rows from measured runs. Independent of engines, clocks and deadlines."""

import math
from bisect import bisect_left
from operator import attrgetter

_SMOOTHING = 0.1
_MOST_PER_RUN = 2.0
"""A run counts as at most this many times its estimate: outliers change it by a tenth, lasting changes 25 runs."""
_MOST_PER_ROW = 1.25
"""Twice the rows are estimated to take at most 2.5 times as long: two runs take twice as long; caches are limited."""
_NEWS = 0.1
"""Relative change of a size's mean that triggers a new curve."""
_MAX_READ = 4096
"""Maximum number of cached points of a curve, because callers choose the numbers of rows."""


class _Size:
    """Moving means of the runs between two powers of two."""

    __slots__ = ("num_runs", "rows", "seconds", "seen", "shown")

    def __init__(self) -> None:
        self.rows = self.seconds = self.shown = 0.0
        self.num_runs = self.seen = 0


class LatencyModel:
    """Seconds per run by number of rows, t(n): a curve through the moving means of each power of two.

    The curve does not decrease with n, and does not rise much faster than proportionally. If means contradict this, the
    more recent measurement wins: measurements of sizes that are no longer run are kept as far as they fit recent ones.
    Below the smallest measured size the curve is constant (a run has a fixed cost); above the largest it continues
    proportionally, as several runs would.

    The engine's threads may call `record` while the event loop reads: a lost update only loses one run.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._curve: dict[int, float] = {}
        self._num_runs = 0

    def record(self, num_rows: int, seconds: float, form: object = ()) -> None:
        """Adds one measured run. All runs of a model with one curve have the same `form`; see forms.py."""
        self._num_runs += 1
        bucket = num_rows.bit_length()
        size = self._sizes.get(bucket)
        if size is None:
            seconds = min(seconds, _MOST_PER_RUN * self.estimate_s(num_rows))
            size = _Size()
            size.rows, size.seconds = num_rows, seconds
            self._sizes = {**self._sizes, bucket: size}  # a new dict: another thread may be iterating over the old one
        else:
            share = max(_SMOOTHING, 1.0 / (size.num_runs + 1))
            size.rows += share * (num_rows - size.rows)
            size.seconds += share * (min(seconds, _MOST_PER_RUN * size.seconds) - size.seconds)
        size.num_runs += 1
        size.seen = self._num_runs
        if abs(size.seconds - size.shown) > _NEWS * size.shown:
            size.shown = size.seconds
            self._curve = {}

    def has_measured(self, num_rows: int, form: object = ()) -> bool:
        """Whether a run between the same two powers of two was measured."""
        return num_rows.bit_length() in self._sizes

    def estimate_s(self, num_rows: int, form: object = ()) -> float:
        """Expected seconds of a run; infinity before the first measurement."""
        known = self._curve.get(num_rows)
        if known is None:
            curve = self._curve  # read before the means: a concurrent change of them starts another curve
            if len(curve) >= _MAX_READ:
                curve.clear()
            known = curve[num_rows] = _read(_knots(self._sizes), num_rows)
        return known


def _knots(sizes: dict[int, _Size]) -> list[tuple[float, float]]:
    """Points (rows, seconds) of the curve; the most recent measurements take precedence."""
    knots: list[tuple[float, float]] = []
    for size in sorted(sizes.values(), key=attrgetter("seen"), reverse=True):
        rows, seconds = size.rows, size.seconds
        place = bisect_left(knots, (rows,))
        if place < len(knots):
            other_rows, other_s = knots[place]
            seconds = min(max(seconds, other_s * rows / other_rows / _MOST_PER_ROW), other_s)
        if place:
            other_rows, other_s = knots[place - 1]
            seconds = max(min(seconds, other_s * rows / other_rows * _MOST_PER_ROW), other_s)
        knots.insert(place, (rows, seconds))
    return knots


def _read(knots: list[tuple[float, float]], num_rows: int) -> float:
    if not knots:
        return math.inf
    place = bisect_left(knots, (num_rows,))
    if place == 0:
        return knots[0][1]
    low_rows, low_s = knots[place - 1]
    if place == len(knots):
        return low_s * num_rows / low_rows
    high_rows, high_s = knots[place]
    return low_s + (high_s - low_s) * (num_rows - low_rows) / (high_rows - low_rows)
