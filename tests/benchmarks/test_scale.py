"""The laws of the scale benchmark: lines through points, and parts of it in small, by the real code."""

import pytest

from benchmarks.scale import following, scraping
from benchmarks.scale.law import fit, laws


def test_a_line_is_fitted_with_the_largest_distance_of_a_point() -> None:
    line = fit([(1, 12.0), (10, 30.0), (100, 210.0)])
    assert (line.a, line.b) == (pytest.approx(10), pytest.approx(2))
    assert line.worst == pytest.approx(0, abs=1e-9)
    square = fit((n, float(n * n)) for n in (1, 10, 100, 500))
    assert square.worst > 0.1, "points off a line must not look like one"
    assert "ms = 10 + 2·n (±0%)" in laws(("servers", "ms"), [[1, 12.0], [10, 30.0], [100, 210.0]])
    with pytest.raises(ValueError, match="two points"):
        fit([(3, 1.0), (3, 2.0)])


def test_each_replica_sends_two_requests_per_poll_for_any_number_of_followers() -> None:
    for number in (1, 3):
        gets, listings, _ = following.following(number, is_controlled=False, looks=2)
        assert (gets, listings) == (2, 0)


def test_models_without_requests_are_a_quarter_of_a_scrape() -> None:
    idle, asked = (scraping.scraping(20, 3, share)[2] for share in (0.0, 1.0))
    assert 0 < idle < 0.25 * asked
