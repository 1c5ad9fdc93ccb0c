"""Nodes of a worker group come when a pool needs them and go when it does not; no request notices."""

import time
from collections.abc import Callable, Iterator

import pytest

from maas_ray.registry.models import Registry
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.store.objects import ObstoreStore
from tests.conftest import RayCluster
from tests.serve.deploy.test_pool import Load
from tests.serve.deploy.test_pool_scaling import heavy
from tests.support.nodes import spread
from tests.support.onnx_models import commit_bundle
from tests.support.worker_group import VARIABLES, head, num_workers, worker_group

pytestmark = [
    pytest.mark.fault,
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with worker_group(head_cpus=1, max_workers=3) as started:
        yield started


def until(is_done: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.5)


def test_nodes_are_added_and_removed_with_replicas_and_no_request_fails(
    group: RayCluster, file_store: ObstoreStore
) -> None:
    from maas_ray.serve.deploy import pool

    Registry(file_store).publish("heavy", commit_bundle(file_store, heavy(size=300), run="run-heavy"))
    Registry(file_store).promote("heavy", 1)
    one = {
        "name": "one",
        "route_prefix": "/one",
        "models": [{"name": "heavy"}],
        "resources": {"cpus": 1},
        "batching": {"max_batch_size": 1},
        "replicas": {"min": 1, "max": 4},
        "autoscaling": {"target_ongoing": 2, "downscale_delay_s": 6},
    }
    spec = {"storage": {"uri": file_store.uri}, "http": {"port": group.http_port}, "pools": [one]}
    pool.deploy(ServeSpec.model_validate(spec))
    assert (spread("one"), num_workers()) == ({head(): 1}, 0)

    with Load(f"http://127.0.0.1:{group.http_port}/one/v2/models/heavy/infer", num_clients=12) as load:
        until(lambda: sum(spread("one").values()) == 4, "four replicas", 300)
        assert num_workers() == 3
        assert set(spread("one").values()) == {1}
        load.wait_for("1", num_more=50)
    assert load.wrong == []

    with Load(f"http://127.0.0.1:{group.http_port}/one/v2/models/heavy/infer", num_clients=1) as load:
        until(lambda: num_workers() == 0, "the nodes are gone", 300)
        load.wait_for("1", num_more=20)
    assert load.wrong == []
    assert spread("one") == {head(): 1}, "the replica that stays is on the node that stays"

    with Load(f"http://127.0.0.1:{group.http_port}/one/v2/models/heavy/infer", num_clients=1) as load:
        load.wait_for("1", num_more=5)
        pool.undeploy(["one"])
        until(lambda: bool(load.wrong), "callers notice that the pool is gone", 60)
