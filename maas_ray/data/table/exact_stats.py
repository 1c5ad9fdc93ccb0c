"""Exact statistics of float32 values, so that partial results merge to the same result in every order.

A float32 is an integer times a power of two; sums of such integers are exact in Python for any number and order of
summands. Medians are found by counting bit patterns, in two passes of bounded memory.
"""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MANTISSA = 24
_LOWEST = -148  # numpy.frexp's exponent of the smallest float32 above zero, 2**-149
_UNIT = _MANTISSA - _LOWEST
_MAX_VALUES = 1 << 24
"""Values summed at once: up to 2**28, the float64 sums of 24-bit integers below are less than 2**53 and exact."""

Floats = NDArray[np.float32]


def power_sums(values: Floats) -> tuple[int, int]:
    """Computes the exact sum and sum of squares of finite values [N].

    Returns:
        The sum in units of 2**-172 and the sum of squares in units of 2**-344; see `mean_and_variance`.
    """
    total = squares = 0
    for start in range(0, len(values), _MAX_VALUES):
        one, two = _power_sums(values[start : start + _MAX_VALUES])
        total, squares = total + one, squares + two
    return total, squares


def _power_sums(values: Floats) -> tuple[int, int]:
    mantissas, exponents = np.frexp(values.astype(np.float64))
    integers = np.ldexp(mantissas, _MANTISSA)
    places = (exponents - _LOWEST).clip(min=0)  # zero has exponent 0; any exponent would do
    squares = integers * integers
    high = np.floor(squares / (1 << _MANTISSA))
    low = squares - high * (1 << _MANTISSA)
    total = _gather(places, integers, 1)
    return total, (_gather(places, high, 2) << _MANTISSA) + _gather(places, low, 2)


def _gather(places: NDArray[Any], weights: NDArray[np.float64], power: int) -> int:
    sums = np.bincount(places, weights=weights)
    return sum(int(sums[place]) << (power * int(place)) for place in np.flatnonzero(sums))


def mean_and_variance(count: int, total: int, squares: int, num_filled: int, fill: float) -> tuple[float, float]:
    """The mean and population variance of `count` summed values and `num_filled` copies of `fill`, rounded once.

    Args:
        count: number of summed values.
        total: their sum, from `power_sums`.
        squares: their sum of squares, from `power_sums`.
        num_filled: number of filled missing values.
        fill: the replacement; not used if `num_filled` is 0.
    """
    n = count + num_filled
    extra = Fraction(fill) if num_filled else Fraction(0)
    mean = (Fraction(total, 1 << _UNIT) + num_filled * extra) / n
    mean_square = (Fraction(squares, 1 << (2 * _UNIT)) + num_filled * extra * extra) / n
    return float(mean), float(mean_square - mean * mean)


def divisor(width: float) -> float:
    """The divisor of a scaling: 1 for constant values, which are then only shifted; graphs divide by its float32."""
    return width if float(np.float32(width)) > 0 else 1.0


def high_counts(values: Floats) -> dict[int, int]:
    """Counts values [N] by the upper 16 bits of their order-preserving key (the first pass of a median)."""
    return _counts(_keys(values) >> np.uint32(16))


def low_counts(values: Floats, high: int) -> dict[int, int]:
    """Counts the values with upper bits `high` by their lower 16 bits (the second pass of a median)."""
    keys = _keys(values)
    return _counts(keys[(keys >> np.uint32(16)) == high] & np.uint32(0xFFFF))


def locate(counts: dict[int, int], rank: int) -> tuple[int, int]:
    """The bucket that contains the value of this rank (from 0), and its rank inside the bucket."""
    for bucket in sorted(counts):
        if rank < counts[bucket]:
            return bucket, rank
        rank -= counts[bucket]
    raise ValueError(f"rank {rank} is not below the number of counted values")


def median_ranks(count: int) -> tuple[int, int]:
    """The ranks whose values' mean is the median; equal for an odd count."""
    return (count - 1) // 2, count // 2


def value_of(high: int, low: int) -> float:
    """The float32 whose key has these upper and lower bits."""
    key = (high << 16) | low
    bits = key ^ 0x80000000 if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def _keys(values: Floats) -> NDArray[np.uint32]:
    """Order-preserving uint32 keys: the sign bit is flipped, or all bits of a negative number."""
    bits = (values + np.float32(0.0)).astype(np.float32).view(np.uint32)  # + 0.0 makes -0.0 the same as 0.0
    sign = np.uint32(0x80000000)
    return np.where(bits & sign, ~bits, bits | sign)


def _counts(keys: NDArray[Any]) -> dict[int, int]:
    found, counts = np.unique(keys, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
