"""Contradictory limits were accepted, and one of them aborted a request that the other allowed."""

import pytest

from maas_ray.cluster.node.environment import MAX_ANSWER_S
from maas_ray.errors import SpecError
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec


def pool(**fields: object) -> ServingSpec:
    return parse_spec(ServeSpec, {"pools": [{"models": [{"name": "m"}], **fields}]}).pools[0]


@pytest.mark.parametrize("timeout_s", [0.5, 30, 119, 270, MAX_ANSWER_S])
def test_missing_limits_are_derived_so_that_a_permitted_request_is_never_aborted(timeout_s: float) -> None:
    spec = pool(limits={"timeout_s": timeout_s})
    assert spec.stuck_run_s > timeout_s
    assert spec.limits.drain_s >= timeout_s


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"limits": {"timeout_s": 300}, "refresh": {"stuck_run_s": 120}}, r"stuck_run_s 120 .*timeout_s 300"),
        ({"limits": {"timeout_s": 300, "drain_timeout_s": 20}}, r"drain_timeout_s 20 .*timeout_s 300"),
        ({"limits": {"max_body_bytes": 200}, "batching": {"max_queued_bytes": 100}}, r"max_body_bytes 200 .*\b100\b"),
    ],
)
def test_a_contradiction_is_refused_with_both_numbers_and_the_way_out(fields: dict[str, object], numbers: str) -> None:
    with pytest.raises(SpecError, match=numbers) as refused:
        pool(**fields)
    assert "lower" in str(refused.value)


def test_consistent_limits_are_used_unchanged() -> None:
    spec = pool(limits={"timeout_s": 20, "drain_timeout_s": 25}, refresh={"stuck_run_s": 60})
    assert (spec.limits.drain_s, spec.stuck_run_s) == (25, 60)
