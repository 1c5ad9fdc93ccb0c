"""Compares two results for one row, except for rounding. Independent of graphs."""

import numpy as np

from maas_ray.bundle.datatypes import Array

_HALF = 4e-3
"""Half precision rounds to about a thousandth."""


def differs(first: Array, second: Array, rtol: float) -> bool:
    """Compares relative to the larger of two values, and to the largest value of both results, for cancellation.

    Args:
        first: a result, or several results for the same row.
        second: a result of the same datatype.
        rtol: relative tolerance of floats; whole numbers, booleans and strings are compared exactly.
    """
    if first.shape != second.shape:
        return True
    if first.dtype.kind != "f":
        return not bool((first == second).all())
    if not first.size:
        return False
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(all="ignore"):
        is_equal = (a == b) | (np.isnan(a) & np.isnan(b))
        if is_equal.all():
            return False
        rest_a, rest_b = a[~is_equal], b[~is_equal]
        if not (np.isfinite(rest_a).all() and np.isfinite(rest_b).all()):
            return True
        finite = np.isfinite(a) & np.isfinite(b)
        largest = max(np.abs(a[finite]).max(), np.abs(b[finite]).max())
        share = max(rtol, _HALF if first.dtype.itemsize == 2 and rtol else 0.0)
        return bool(
            (np.abs(rest_a - rest_b) > share * (np.maximum(np.abs(rest_a), np.abs(rest_b)) + share * largest)).any()
        )
