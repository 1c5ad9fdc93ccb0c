"""The latency model: learning, robustness against outliers, and aging of old measurements."""

import itertools
import math
import random
import tracemalloc

import pytest

from maas_ray.bundle.engine.latency import LatencyModel


def affine(num_rows: int) -> float:
    return 400e-6 + 40e-6 * num_rows


def seeded(*sizes: int) -> LatencyModel:
    model = LatencyModel()
    for num_rows in sizes or (1, 2, 4, 8, 16, 32, 64):
        model.record(num_rows, affine(num_rows))
    return model


def test_the_estimate_follows_what_is_measured() -> None:
    model = LatencyModel()
    assert model.estimate_s(1) == math.inf
    model.record(8, 0.1)
    assert model.estimate_s(8) == 0.1
    assert model.estimate_s(1) == 0.1, "a run has a fixed cost, so fewer rows are not assumed to be faster"
    assert model.estimate_s(32) == pytest.approx(0.4), "more rows are assumed to take longer in proportion"
    for _ in range(100):
        model.record(8, 0.2)
    assert model.estimate_s(8) == pytest.approx(0.2, rel=0.1)


def test_sizes_between_the_seeds_are_interpolated() -> None:
    model = seeded()
    for num_rows in range(1, 65):
        assert model.estimate_s(num_rows) == pytest.approx(affine(num_rows), rel=1e-6)


def test_it_converges_from_traffic_of_random_sizes_alone() -> None:
    dice = random.Random(0)
    model = LatencyModel()
    for _ in range(3000):
        num_rows = dice.randint(1, 64)
        model.record(num_rows, affine(num_rows) * dice.uniform(0.9, 1.1))
    for num_rows in (1, 5, 20, 40, 60):
        assert model.estimate_s(num_rows) == pytest.approx(affine(num_rows), rel=0.3)


def test_a_hiccup_moves_nothing_much() -> None:
    model = seeded()
    for number in range(1000):
        model.record(8, 0.05 if number % 100 == 50 else affine(8))
    model.record(8, 0.05)
    assert model.estimate_s(8) < 1.3 * affine(8)


def test_a_hiccup_as_the_first_run_of_a_size_is_not_believed() -> None:
    model = seeded(1, 2, 4, 8)
    model.record(16, 0.05)
    assert model.estimate_s(16) <= 2.5 * model.estimate_s(8)


def test_a_lasting_change_is_learned_within_fifty_runs() -> None:
    model = seeded()
    for _ in range(50):
        model.record(8, 10 * affine(8))
    assert model.estimate_s(8) == pytest.approx(10 * affine(8), rel=0.25)
    for _ in range(50):
        model.record(8, affine(8))
    assert model.estimate_s(8) == pytest.approx(affine(8), rel=0.25)


def test_recent_measurements_take_precedence_over_sizes_no_longer_run() -> None:
    """A machine that was slow while 64 rows were measured must not keep runs of 64 rows from being tried again."""
    model = seeded(1, 2, 4, 8, 16, 32)
    model.record(64, 1.0)
    for _ in range(100):
        model.record(64, 1.0)
    for _ in range(100):
        model.record(32, affine(32))
    assert model.estimate_s(64) <= 2.6 * affine(32)
    for _ in range(100):
        model.record(4, 0.1)
    assert model.estimate_s(64) >= 0.1, "more rows never take less than fewer, which were measured later"


def test_it_never_falls_with_the_number_of_rows() -> None:
    dice = random.Random(1)
    model = LatencyModel()
    for _ in range(2000):
        model.record(dice.randint(1, 200), dice.expovariate(1000.0))
        if dice.random() < 0.05:
            curve = [model.estimate_s(num_rows) for num_rows in range(1, 300)]
            assert all(later >= earlier for earlier, later in itertools.pairwise(curve))
            assert all(0 < seconds < math.inf for seconds in curve)


def test_callers_that_choose_ever_other_numbers_of_rows_take_no_memory() -> None:
    model = seeded()
    tracemalloc.start()
    for num_rows in range(1, 50_000):
        model.estimate_s(num_rows)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 20, "50,000 points would take several MB"
