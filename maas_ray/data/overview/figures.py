"""Figures of the values of one column. Independent of data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NUM_BINS = 20
NUM_TOP = 10
_FAR = 3.0


@dataclass(frozen=True)
class Figures:
    """The distribution of the values that are present."""

    distinct: int
    summary: str
    """Range and quartiles, or the most frequent values."""
    bars: tuple[tuple[str, int], ...]
    """Rows per bin, or per frequent value; the labels are for display."""
    num_outliers: int = 0
    """Numbers more than 3 interquartile ranges below the first or above the third quartile."""


def number_figures(values: NDArray[np.float64], *, is_time: bool = False) -> Figures:
    """Figures of finite numbers [N].

    Args:
        values: the numbers.
        is_time: they are seconds since 1970.
    """
    if not len(values):
        return Figures(0, "", ())
    show = _time if is_time else _number
    low, first, middle, third, high = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    width = third - first
    is_far = (values < first - _FAR * width) | (values > third + _FAR * width)
    counts, edges = np.histogram(values, NUM_BINS) if high > low else (np.array([len(values)]), np.array([low, high]))
    bars = tuple((f"{show(edges[i])} to {show(edges[i + 1])}", int(count)) for i, count in enumerate(counts.tolist()))
    spread = "" if is_time else f", mean {_number(float(values.mean()))} ± {_number(float(values.std()))}"
    summary = f"{show(low)} to {show(high)}, median {show(middle)}{spread}"
    return Figures(len(np.unique(values)), summary, bars, int(is_far.sum()) if width > 0 else 0)


def category_figures(values: pa.Array) -> Figures:
    """Figures of categories without missing values."""
    counted = pc.value_counts(values).to_pylist()
    pairs = sorted(((str(one["values"]), int(one["counts"])) for one in counted), key=lambda pair: (-pair[1], pair[0]))
    return Figures(len(pairs), _shares(pairs, len(values)), tuple(pairs[:NUM_TOP]))


def _shares(pairs: Sequence[tuple[str, int]], total: int) -> str:
    shown = [f"{name[:30]} {number / total:.1%}" for name, number in pairs[:3]]
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return ", ".join(shown) + more


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.10g}"


def _time(value: float) -> str:
    try:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):
        return _number(value)
