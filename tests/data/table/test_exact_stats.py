"""Sums, variances and medians of float32 values are exact and merge to the same result in any order."""

import statistics
from fractions import Fraction

import numpy as np
import pytest

from maas_ray.data.table import exact_stats


def _values(kind: str, n: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == "normal":
        return rng.normal(size=n).astype(np.float32)
    if kind == "wide":  # every exponent that float32 has, subnormal numbers included
        return np.ldexp(rng.uniform(-1, 1, n), rng.integers(-149, 128, n)).astype(np.float32)
    if kind == "cancelling":
        large = (rng.normal(size=n // 2) * 1e30).astype(np.float32)
        return np.concatenate([large, -large, np.float32([1.0])])
    if kind == "extremes":
        return np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, 2**-149, -(2**-149), 0, -0.0], np.float32)
    return np.full(n, np.float32(0.1))


KINDS = ["normal", "wide", "cancelling", "extremes", "constant"]


@pytest.mark.parametrize("kind", KINDS)
def test_power_sums_equal_rational_arithmetic(kind: str) -> None:
    values = _values(kind)
    total, squares = exact_stats.power_sums(values)
    assert Fraction(total, 2**172) == sum(map(Fraction, values.tolist()))
    assert Fraction(squares, 2**344) == sum(Fraction(value) ** 2 for value in values.tolist())


def test_float64_sums_do_depend_on_the_order_which_is_why_these_are_exact() -> None:
    values = _values("wide")
    assert values.astype(np.float64).sum() != values[::-1].astype(np.float64)[np.argsort(values)].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_variance_are_rounded_once(kind: str) -> None:
    values = _values(kind)
    fractions = [Fraction(value) for value in values.tolist()] + [Fraction(3, 2)] * 5
    mean = sum(fractions) / len(fractions)
    variance = sum((value - mean) ** 2 for value in fractions) / len(fractions)
    found = exact_stats.mean_and_variance(len(values), *exact_stats.power_sums(values), 5, 1.5)
    assert found == (float(mean), float(variance))


def test_a_constant_column_has_no_variance_at_all() -> None:
    values = _values("constant")
    assert exact_stats.mean_and_variance(len(values), *exact_stats.power_sums(values), 0, 0.0)[1] == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5, 6, 1000])
def test_the_median_found_by_counting_is_the_median(kind: str, n: int) -> None:
    values = _values(kind)[:n]
    high = exact_stats.high_counts(values)
    found = []
    for rank in exact_stats.median_ranks(len(values)):
        bucket, inside = exact_stats.locate(high, rank)
        found.append(
            exact_stats.value_of(bucket, exact_stats.locate(exact_stats.low_counts(values, bucket), inside)[0])
        )
    assert sum(found) / 2 == statistics.median(values.tolist())


def test_no_values_sum_to_zero() -> None:
    assert exact_stats.power_sums(np.empty(0, np.float32)) == (0, 0)
