"""Serve's scheduler with our placement: nodes of replicas, and the cost of placing many at once."""

import pytest

from benchmarks.scale.controller import POOL, Nodes, place, scheduler_of
from maas_ray.serve.controller.scheduler import PoolScheduler


def by_node(found: PoolScheduler) -> list[str]:
    """The nodes of the replicas in the order in which they were placed."""
    return [info.target_node_id for info in found._launching_replicas[POOL].values()]


@pytest.mark.parametrize("strategy", ["spread", "pack"])
def test_replicas_placed_in_one_round_land_where_they_would_one_by_one(strategy: str) -> None:
    together, apart = scheduler_of(7, 4.0), scheduler_of(7, 4.0)
    for found in (together, apart):
        found._strategies[POOL] = strategy
    place(together, 0, 28)
    for number in range(28):
        place(apart, number, 1)
    assert by_node(together) == by_node(apart)
    counts = [by_node(together).count(node) for node in sorted(together._cluster_node_info_cache.get_active_node_ids())]
    assert counts == [4] * 7
    place(together, 28, 1)
    assert by_node(together)[-1] is None, "without room it is Ray that waits"


def test_a_round_reads_the_labels_of_each_node_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_reads = 0
    read = Nodes.get_node_labels

    def counted(self: Nodes, node: str) -> dict[str, str]:
        nonlocal num_reads
        num_reads += 1
        return read(self, node)

    monkeypatch.setattr(Nodes, "get_node_labels", counted)
    found = scheduler_of(20, 11.0)
    place(found, 0, 200)
    assert num_reads == 20
    assert len(by_node(found)) == 200


def test_the_fullest_nodes_lose_replicas_first_and_the_head_last() -> None:
    found = scheduler_of(3, 10.0)
    place(found, 0, 9)
    for replica, info in list(found._launching_replicas[POOL].items()):
        found.on_replica_running(replica, info.target_node_id)
    running = dict(found._running_replicas[POOL])
    stopped = found._get_replicas_to_stop(POOL, 7)
    left = [node for replica, node in running.items() if replica not in stopped]
    assert len(stopped) == 7
    assert found._head_node_id in left
    assert len(set(left)) == 2
