"""The replicas of a pool are on different machines, and a machine that returns gets its share, without a failed request."""

import time
from collections.abc import Iterator

import pytest

from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.asking import Asking
from tests.support.hosts.served import ask, publish, serve, statuses, write_spec

SHARE_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(3) as found:
        publish(found)
        ray_cluster.start(found, num_cpus=3)
        yield found


def replicas(network: Network) -> list[int]:
    return [len(host.pids("ray::ServeReplica")) if host.is_up else 0 for host in network.hosts]


def test_replicas_are_spread_and_a_machine_that_returns_gets_its_share(network: Network):
    serve(network, write_spec(network, {"replicas": 2}))
    assert replicas(network) == [0, 1, 1]
    assert statuses(network.hosts) == [200] * 3
    head, first, second = network.hosts
    with Asking([head, first]) as asking:
        second.lose()
        until(lambda: replicas(network) == [0, 2, 0], 120, "the replica of the lost machine elsewhere")
        second.boot()
        ray_cluster.wait_for_nodes(network, 3, 120)
        joined_s = time.monotonic()
        until(lambda: replicas(network) == [0, 1, 1], 2 * SHARE_WITHIN_S, "the share of the machine that returned")
        assert time.monotonic() - joined_s < SHARE_WITHIN_S
        until(lambda: statuses([second]) == [200], 60, "the front of the machine that returned")
    assert asking.num_answered > 50
    assert asking.failures == []


def test_a_load_balancer_sees_which_front_to_ask(network: Network):
    """`/-/healthz`: 200 where requests are taken; while a machine drains 503, and requests are still answered."""
    serve(network, write_spec(network, {"replicas": 2}))
    head, _, second = network.hosts
    assert [ask(host, "/-/healthz", None).status_code for host in network.hosts] == [200] * 3
    seen: list[tuple[int | str, int | str]] = []
    stopping = second.start("systemctl stop maas-ray", "stop.log")
    with Asking([head]) as asking:
        while stopping.poll() is None:
            seen.append((statuses([second], "/-/healthz")[0], statuses([second])[0]))
            time.sleep(0.2)
    assert asking.failures == []
    told = [answers for health, answers in seen if health == 503]
    assert told, seen
    assert set(told) <= {200, "ConnectionError"}  # from the first 503 on it may be left out; until it ends it answers
    assert seen[-1][0] == "ConnectionError"
    second.run("systemctl start maas-ray")
    ray_cluster.wait_for_nodes(network, 3, 120)
    until(lambda: statuses([second], "/-/healthz") == [200], 120, "the front of the machine that returned")


def until(is_so, wait_s: float, what: str) -> None:
    deadline = time.monotonic() + wait_s
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
