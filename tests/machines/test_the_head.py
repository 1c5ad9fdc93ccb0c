"""Pools serve on while the head is away and after its return; a cluster that was lost whole serves again."""

import time
from collections.abc import Iterator

import pytest

from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.asking import Asking
from tests.support.hosts.ray_cluster import on_head
from tests.support.hosts.served import publish, serve, statuses, store_uri, write_spec

AWAY_S = 10.0


@pytest.fixture(scope="module")
def served() -> Iterator[Network]:
    """Two replicas on two workers; the head knows where the record of its pools is."""
    with Network(3) as network:
        publish(network)
        ray_cluster.start(network, num_cpus=3, env={"MAAS_RAY_STORE": store_uri(network)})
        serve(network, write_spec(network, {"replicas": 2}))
        yield network


def test_requests_are_answered_while_the_head_is_away_and_after_its_return(served: Network):
    head, *workers = served.hosts
    with Asking(workers) as asking:
        head.lose()
        time.sleep(AWAY_S)
        head.boot()
        ray_cluster.wait_for_nodes(served, 3, 120)
        until_statuses(served, [200] * 3)
    assert asking.num_answered > 50
    assert asking.failures == []
    # And it is the head of this cluster again: replicas are those from before, and more can be had.
    serve(served, write_spec(served, {"replicas": 3}))
    assert len([pid for host in served.hosts for pid in host.pids("ray::ServeReplica")]) == 3


def test_the_version_that_was_promoted_while_the_head_was_away_is_served(served: Network):
    head, *workers = served.hosts
    head.lose()
    version = publish(served, scale=3.0)
    deadline = time.monotonic() + 60
    while [ask_version(host) for host in workers] != [str(version)] * 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    head.boot()
    ray_cluster.wait_for_nodes(served, 3, 120)
    until_statuses(served, [200] * 3)


def test_a_head_that_has_forgotten_its_pools_is_noticed_and_they_are_served_again(served: Network):
    """The planted fault: all hosts are lost, and with them what the head had written down."""
    for host in served.hosts:
        host.lose()
    head = served.hosts[0]
    for path in sorted((head.home / "maas-ray-head").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (head.home / "maas-ray-head").mkdir(exist_ok=True)
    for host in served.hosts:
        host.boot()
    ray_cluster.wait_for_nodes(served, 3, 180)
    until_statuses(served, [200] * 3, timeout_s=240)
    said = on_head(served, f"maas-ray serve --restore --store {store_uri(served)}", timeout_s=300)
    assert "nothing" in said or "default" in said


def test_without_the_units_nothing_restarts(served: Network):
    """The other planted fault: a head whose unit does not start again leaves its cluster without one."""
    head = served.hosts[0]
    unit = head.kept / "units" / "maas-ray.service"
    text = unit.read_text()
    unit.write_text(text.replace("Restart=always", "Restart=no"))
    try:
        for pid in head.pids("ray start"):
            head.kill(pid)
        with pytest.raises(AssertionError):
            ray_cluster.wait_for_nodes(served, 3, 15)
    finally:
        unit.write_text(text)
        head.run("systemctl start maas-ray")
    ray_cluster.wait_for_nodes(served, 3, 120)


def ask_version(host) -> str:
    from tests.support.hosts.served import ask

    return str(ask(host).json()["model_version"])


def until_statuses(network: Network, wanted: list[int], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (found := statuses(network.hosts)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
