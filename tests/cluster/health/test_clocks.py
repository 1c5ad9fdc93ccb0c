"""Clocks of nodes: the measurement on a real cluster, and the refusal of a large difference."""

import time

import pytest

from maas_ray.cluster.health.clocks import MAX_SKEW_S, Clock, check_clocks, measure_clocks, refuse_skew
from tests.conftest import RayCluster

HEAD = Clock("10.0.0.1", 0.0, 0.002, is_head=True)


def test_the_clock_of_this_machine_agrees_with_itself(ray_cluster: RayCluster) -> None:
    (found,) = measure_clocks()
    assert abs(found.offset_s) <= found.rtt_s / 2 + 0.05
    assert found.is_head
    assert check_clocks([found]).ok
    refuse_skew()


def test_a_clock_that_is_ahead_is_measured(ray_cluster: RayCluster) -> None:
    """Injected fault: the node's clock is a minute ahead."""
    (found,) = measure_clocks(read=lambda: time.time() + 60)
    assert abs(found.offset_s - 60) <= found.rtt_s / 2 + 0.05
    check = check_clocks([HEAD, found._replace(is_head=False)])
    assert not check.ok
    assert f"the clock of node {found.node} is " in check.detail
    assert "s ahead of node 10.0.0.1" in check.detail


@pytest.mark.parametrize(
    ("offset_s", "rtt_s", "is_fine"),
    [
        (0.01, 0.002, True),
        (-MAX_SKEW_S + 0.1, 0.002, True),
        (MAX_SKEW_S + 0.1, 0.002, False),
        (-MAX_SKEW_S - 0.1, 0.002, False),
        (MAX_SKEW_S + 0.5, 2.0, True),
        (3600.0, 2.0, False),
    ],
)
def test_a_difference_counts_only_beyond_its_uncertainty(offset_s: float, rtt_s: float, is_fine: bool) -> None:
    """A node that took two seconds to answer may have read its clock a second before or after."""
    assert check_clocks([HEAD, Clock("10.0.0.2", offset_s, rtt_s)]).ok is is_fine


def test_nodes_are_compared_with_the_head_node_and_not_with_the_caller() -> None:
    """A laptop with a wrong clock checks a cluster whose clocks agree."""
    assert check_clocks([HEAD._replace(offset_s=100.0), Clock("10.0.0.2", 100.1, 0.01)]).ok
    wrong = check_clocks([HEAD._replace(offset_s=100.0), Clock("10.0.0.2", 0.0, 0.01)])
    assert "node 10.0.0.2 is 100.0 s behind node 10.0.0.1" in wrong.detail
    assert "NTP" in wrong.fix
