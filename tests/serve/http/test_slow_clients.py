"""Limits of slow clients, with a clock that the test moves."""

import pytest

from maas_ray.serve.http.back_pressure import WriteBacklog
from maas_ray.serve.http.slow_clients import BodySpeed
from maas_ray.serve.spec.limits import LimitsSpec

LIMITS = LimitsSpec(io_timeout_s=2.0, min_bytes_per_s=100)


def test_a_body_is_measured_over_the_time_since_the_last_check() -> None:
    speed = BodySpeed()
    speed.start(10.0)
    assert not speed.is_due(12.0, LIMITS)
    assert speed.is_due(12.5, LIMITS)
    assert speed.check(12.5, 10_000, LIMITS) == ""
    assert not speed.is_due(14.0, LIMITS), "the next period has begun"
    assert speed.check(15.0, 10_199, LIMITS) == (
        "199 bytes of the body arrived in the last 2 s; send at least 100 bytes per second"
    )
    speed.start(20.0)
    assert speed.check(22.5, 200, LIMITS) == "", "a new body counts from zero"


@pytest.mark.parametrize(("left", "is_stuck"), [(801, True), (800, False), (0, False)])
def test_a_reader_has_to_take_as_many_bytes_as_the_minimum_speed_requires(left: int, is_stuck: bool) -> None:
    backlog = WriteBacklog()
    assert not backlog.is_waiting
    backlog.start(10.0, 1000)
    assert backlog.is_waiting
    assert not backlog.is_stuck(12.0, 1000, LIMITS), "it has had no time yet"
    assert backlog.is_stuck(12.5, left, LIMITS) == is_stuck
    backlog.end()
    assert not backlog.is_waiting
