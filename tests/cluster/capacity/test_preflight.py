"""Preflight: workers that a cluster can never run are refused within seconds, with the reason."""

import pytest

from maas_ray.cluster import wait_for_nodes
from maas_ray.cluster.capacity.preflight import count_workers, explain, preflight
from maas_ray.errors import ResourcesMissing
from tests.conftest import RayCluster


@pytest.mark.parametrize(
    ("nodes", "needed", "fits"),
    [
        ([{"CPU": 4.0}], {"CPU": 2.0}, 2),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2),  # 6 CPUs in total, but a worker runs on one node
        ([{"CPU": 0.3}], {"CPU": 0.1}, 3),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, 1),
        ([{"CPU": 8.0}], {"GPU": 1.0}, 0),
        ([{}], {}, 100),
        ([], {}, 0),
    ],
)
def test_equal_workers_are_counted_node_by_node(nodes: list[dict[str, float]], needed: dict[str, float], fits: int):
    assert count_workers(nodes, needed, limit=100) == fits


def test_workers_that_fit_pass_and_others_are_refused(ray_cluster: RayCluster):
    preflight(8, {"CPU": 1, "GPU": 0})
    with pytest.raises(
        ResourcesMissing, match=r"9 workers of 1 CPU each .* can run 8 of them: missing 1 CPU .* available 8"
    ):
        preflight(9, {"CPU": 1, "GPU": 0})


def test_a_resource_that_no_node_has_is_reported(ray_cluster: RayCluster):
    with pytest.raises(ResourcesMissing, match="one worker needs 1 GPU, the largest node has 0"):
        preflight(1, {"CPU": 1, "GPU": 1})


def test_fragmentation_is_distinguished_from_a_deficit():
    message = explain(3, {"CPU": 2.0}, [{"CPU": 3.0}, {"CPU": 3.0}], 2)
    assert "split over nodes" in message


def test_workers_that_must_share_a_node_are_refused_if_no_node_is_large_enough(ray_cluster: RayCluster):
    preflight(8, {"CPU": 1}, together=8)
    preflight(4, {"CPU": 2}, together=2)
    with pytest.raises(ResourcesMissing, match=r"can run 0 of them: .*missing 1 CPU"):
        preflight(9, {"CPU": 1}, together=9)
    message = explain(4, {"CPU": 1.0}, [{"CPU": 1.0}] * 4, 0, together=2)
    assert "groups of 2 workers must share a node" in message


def test_waiting_for_nodes_ends_at_its_deadline(ray_cluster: RayCluster):
    wait_for_nodes(1, timeout_s=1)
    with pytest.raises(ResourcesMissing, match="1 of 2 nodes have joined the cluster within 1 s"):
        wait_for_nodes(2, timeout_s=1)
