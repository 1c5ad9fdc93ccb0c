"""Both replicas of a pool ran on one node, another node had no front, and nothing moved when a node returned."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from maas_ray.errors import ResourcesMissing
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore, open_store
from tests.conftest import RayCluster, unused_port
from tests.serve.deploy.test_pool import Load, serve_spec
from tests.support.nodes import Nodes, more_nodes, spread
from tests.support.onnx_models import commit_bundle, linear
from tests.support.runs import until

pytestmark = [
    # Ray's own use of pydantic, at import, and of the sockets of its clients.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HERE = {"rig": "n4"}
"""Label of the nodes that the pools of this file may use; the head has none."""
_until = partial(until, wait_s=60)


@pytest.fixture
def store(tmp_path: Path) -> ObstoreStore:
    store = open_store(f"file://{tmp_path}/store")
    registry = Registry(store)
    registry.publish("linear", commit_bundle(store, linear(2.0)))
    registry.promote("linear", 1)
    return store


@pytest.fixture
def nodes(ray_cluster: RayCluster, tmp_path: Path) -> Iterator[Nodes]:
    from maas_ray.serve.deploy import pool

    with more_nodes(ray_cluster, tmp_path) as nodes:
        yield nodes
        pool.undeploy([status.name for status in pool.status()])


def deploy(cluster: RayCluster, store: ObstoreStore, **described: Any) -> None:
    from maas_ray.serve.deploy import pool

    pool.deploy(serve_spec(cluster, store, **{"resources": {"cpus": 0.4}, **described}))


@pytest.mark.fault
def test_a_pool_is_spread_and_a_node_that_returns_gets_its_share(
    ray_cluster: RayCluster, nodes: Nodes, store: ObstoreStore
) -> None:
    first, second = nodes.add(2, HERE), nodes.add(2, HERE)
    deploy(ray_cluster, store, replicas=4, placement={"labels": HERE})
    assert spread("one") == {first: 2, second: 2}
    nodes.kill(second)
    _until(lambda: spread("one") == {first: 4}, "replicas of the lost node elsewhere")
    with Load(f"http://127.0.0.1:{ray_cluster.http_port}/one/v2/models/linear/infer") as load:
        load.wait_for("1")
        second = nodes.add(2, HERE)
        _until(lambda: spread("one") == {first: 2, second: 2}, "share of the node that returned")
        load.wait_for("1", 500)
    assert load.wrong == []


@pytest.mark.fault
def test_fewer_replicas_leave_the_fullest_node_first(
    ray_cluster: RayCluster, nodes: Nodes, store: ObstoreStore
) -> None:
    first, second = nodes.add(2, HERE), nodes.add(2, HERE)
    deploy(ray_cluster, store, replicas=4, placement={"labels": HERE})
    deploy(ray_cluster, store, replicas=2, placement={"labels": HERE})
    _until(lambda: spread("one") == {first: 1, second: 1}, "one replica on each")


@pytest.mark.fault
def test_packed_replicas_share_a_node_and_single_ones_never_do(
    ray_cluster: RayCluster, nodes: Nodes, store: ObstoreStore
) -> None:
    first, second = nodes.add(2, HERE), nodes.add(2, HERE)
    deploy(ray_cluster, store, replicas=3, placement={"strategy": "pack", "labels": HERE})
    assert sorted(spread("one").values()) == [3]
    alone = {"strategy": "one_per_node", "labels": HERE}
    deploy(ray_cluster, store, replicas=2, placement=alone)
    assert spread("one") == {first: 1, second: 1}
    with pytest.raises(ResourcesMissing, match="one per node, but only 2 fit on its 2 nodes with the labels"):
        deploy(ray_cluster, store, replicas=3, placement=alone)
    deploy(ray_cluster, store, replicas=2, placement=alone, server_name="changed")  # one at a time, each in its place
    assert spread("one") == {first: 1, second: 1}


@pytest.mark.fault
def test_a_node_without_a_replica_has_a_front_unless_it_is_labeled(
    ray_cluster: RayCluster, nodes: Nodes, store: ObstoreStore
) -> None:
    from ray import serve

    port = unused_port()
    with_front = nodes.add(1, front_port=port)
    without = nodes.add(1, HERE)
    deploy(ray_cluster, store, replicas=1, placement={"labels": HERE})
    assert set(spread("one")) == {without}

    def asked(path: str) -> int:
        """The status; 0 where nothing listens."""
        try:
            return requests.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code
        except requests.ConnectionError:
            return 0

    _until(lambda: asked("/-/healthz") == 200, "healthy front of the node without a replica")
    assert asked("/one/v2/health/ready") == 200
    proxies = serve.status().proxies
    assert with_front in proxies
    assert without not in proxies
    # Health check of a load balancer: first it fails, then nothing listens; requests are answered during that time.
    nodes.drain(with_front)
    _until(lambda: asked("/-/healthz") in (503, 0), "front that says it drains")
    if asked("/-/healthz") == 503:
        assert asked("/one/v2/health/ready") in (200, 0)
    _until(lambda: asked("/-/healthz") == 0, "end of the front")
