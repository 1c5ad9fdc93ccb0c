"""An update that did not fit twice stayed DEPLOYING forever without a reason, and held resources of other pools.

The session's cluster has 8 CPUs: a third replica of a pool with 2 replicas of 3 CPUs does not fit.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.errors import ClusterError, ResourcesMissing
from maas_ray.registry.models import Registry
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from tests.conftest import RayCluster
from tests.serve.deploy.test_pool import Load, serve_spec
from tests.support.nodes import replicas
from tests.support.onnx_models import commit_bundle, linear
from tests.support.paths import digits_spec
from tests.support.runs import until

pytestmark = [
    # Ray's own use of pydantic, at import, and of the sockets of its clients.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TWO = {"replicas": 2, "resources": {"cpus": 3}}
_until = partial(until, wait_s=120)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ObstoreStore:
    """`linear` is fine, `broken` does not load."""
    store = open_store(f"file://{tmp_path_factory.mktemp('n5')}/store")
    bundles = {"linear": commit_bundle(store, linear(2.0)), "broken": commit_bundle(store, linear(7.0), run="broken")}
    (graph,) = Path(store.uri.removeprefix("file://")).glob(f"bundles/{bundles['broken']}/parts-*/model.onnx")
    graph.write_bytes(graph.read_bytes()[:-1])
    registry = Registry(store)
    for name, bundle in bundles.items():
        registry.promote(name, registry.publish(name, bundle).version)
    return store


@pytest.fixture
def pools(ray_cluster: RayCluster) -> Iterator[Any]:
    from maas_ray.serve.deploy import pool

    yield pool
    pool.undeploy([status.name for status in pool.status()])


def spec_of(cluster: RayCluster, store: ObstoreStore, **described: Any) -> ServeSpec:
    return serve_spec(cluster, store, **{**TWO, **described})


def url(cluster: RayCluster, pool: str = "one") -> str:
    return f"http://127.0.0.1:{cluster.http_port}/{pool}/v2/models/linear/infer"


@pytest.mark.fault
def test_what_does_not_fit_twice_is_replaced_one_at_a_time(
    ray_cluster: RayCluster, store: ObstoreStore, pools: Any
) -> None:
    said: list[str] = []
    pools.deploy(spec_of(ray_cluster, store), say=said.append)
    with Load(url(ray_cluster)) as load:
        load.wait_for("1")
        pools.deploy(spec_of(ray_cluster, store, server_name="new"), say=said.append)
        load.wait_for("1")
    assert load.wrong == []
    assert said[0].startswith("pool 'one': first start, needs 2 × 3 CPU, free: 8 CPU on 127.0.0.1 (node ")
    assert "update, needs 2 × 3 CPU, free: 2 CPU on 127.0.0.1" in said[1]
    assert said[1].endswith("one at a time: 1 of 2 replicas is unavailable at a time")
    # A pool that does not fit is refused immediately, with the numbers; nothing changes.
    with pytest.raises(ResourcesMissing, match=r"can never run .* needs 3 × 3 CPU, but only 2 fit .*8 CPU on"):
        pools.deploy(spec_of(ray_cluster, store, replicas=3))
    with pytest.raises(ResourcesMissing, match=r"without downtime: 1 × 5 CPU .*rollout\.allow_downtime: true"):
        pools.deploy(spec_of(ray_cluster, store, replicas=1, resources={"cpus": 5}))
    (status,) = pools.status(["one"])
    assert (status.status, status.num_running) == ("RUNNING", 2)


@pytest.mark.fault
def test_a_downtime_is_taken_only_where_it_is_allowed(ray_cluster: RayCluster, store: ObstoreStore, pools: Any) -> None:
    one = {"replicas": 1, "resources": {"cpus": 5}}
    pools.deploy(spec_of(ray_cluster, store, **one))
    with pytest.raises(ResourcesMissing, match="cannot be updated without downtime"):
        pools.deploy(spec_of(ray_cluster, store, **one, server_name="new"))
    said: list[str] = []
    pools.deploy(
        spec_of(ray_cluster, store, **one, server_name="new", rollout={"allow_downtime": True}), say=said.append
    )
    assert any("the pool is down until a new one is ready" in line for line in said)


@pytest.mark.fault
def test_a_failed_update_is_rolled_back_and_reports_why(
    ray_cluster: RayCluster, store: ObstoreStore, pools: Any
) -> None:
    from maas_ray.serve.deploy.record import latest

    pools.deploy(spec_of(ray_cluster, store))
    with Load(url(ray_cluster)) as load:
        load.wait_for("1")
        with pytest.raises(
            ClusterError, match=r"model.onnx has .* bytes instead of .*; it was rolled back to the previous version"
        ):
            pools.deploy(spec_of(ray_cluster, store, models=[{"name": "broken"}]))
        load.wait_for("1")
    assert load.wrong == []
    (status,) = pools.status(["one"])
    assert (status.status, status.num_running) == ("RUNNING", 2)
    recorded = latest(store)
    assert recorded is not None
    assert [model.name for model in recorded.pools[0].models] == ["linear"]
    with pytest.raises(ClusterError, match="the new pool was removed"):
        pools.deploy(
            spec_of(
                ray_cluster,
                store,
                name="two",
                route_prefix="/two",
                replicas=1,
                models=[{"name": "broken"}],
                resources={"cpus": 1},
            )
        )
    assert [status.name for status in pools.status()] == ["one"]


@pytest.mark.fault
def test_a_stuck_update_is_rolled_back_although_its_command_was_killed(
    ray_cluster: RayCluster, store: ObstoreStore, pools: Any, tmp_path: Path
) -> None:
    pools.deploy(spec_of(ray_cluster, store))
    # It loads `linear` only, and so is never ready as a whole: Serve calls it healthy.
    models = [{"name": "linear"}, {"name": "broken"}]
    changed = spec_of(ray_cluster, store, models=models, strict_readiness=True, rollout={"timeout_s": 15})
    file = tmp_path / "pools.yaml"
    file.write_text(yaml.safe_dump(changed.model_dump(mode="json")))
    command = [sys.executable, "-m", "maas_ray.cli", "serve", str(file), "--state-dir", str(ray_cluster.state_dir)]
    with subprocess.Popen(command, env={**os.environ, **ray_cluster.env}) as serve:
        _until(lambda: {state for state, _ in replicas("one")} - {"RUNNING"}, "change of a replica")
        serve.send_signal(signal.SIGKILL)
    with Load(url(ray_cluster)) as load:
        _until(lambda: models_of("one") == ["linear"], "old description")
        _until(lambda: [state for state, _ in replicas("one")] == ["RUNNING", "RUNNING"], "old replicas")
        load.wait_for("1")
    assert load.wrong == []
    _until(lambda: pools.status(["one"])[0].message, "reason")
    assert "v2/health/ready answers 503; it was rolled back to the previous version" in pools.status(["one"])[0].message
    pools.deploy(spec_of(ray_cluster, store))  # nothing is in its way
    assert pools.status(["one"])[0].message == ""


def models_of(pool: str) -> list[str]:
    from maas_ray.serve.deploy.standing import read_standings

    spec = read_standings()[pool].spec
    assert spec is not None
    return [model.name for model in spec.models]


@pytest.mark.fault
def test_two_commands_that_need_the_same_resources_run_one_after_the_other(
    ray_cluster: RayCluster, store: ObstoreStore, pools: Any
) -> None:
    """Each update needs 3 additional CPUs, and 3 are free."""
    small = {"replicas": 1, "resources": {"cpus": 2.5}}
    both = {name: {**small, "name": name, "route_prefix": f"/{name}"} for name in ("one", "two")}
    for described in both.values():
        pools.deploy(spec_of(ray_cluster, store, **described))
    ended: dict[str, object] = {}
    said: list[str] = []

    def update(name: str) -> None:
        try:
            ended[name] = pools.deploy(spec_of(ray_cluster, store, **both[name], server_name="new"), say=said.append)
        except ClusterError as error:
            ended[name] = error

    threads = [threading.Thread(target=update, args=(name,)) for name in both]
    with Load(url(ray_cluster)) as one, Load(url(ray_cluster, "two")) as two:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    assert [type(ended[name]) for name in both] == [list, list], ended
    assert one.wrong == two.wrong == []
    assert any(line.startswith("waiting for another deployment to end; its pools:") for line in said)
    # The same in one command: the second pool gets the resources that the first one leaves.
    described = [spec_of(ray_cluster, store, **both[name], server_name="newest").pools[0] for name in both]
    pools.deploy(spec_of(ray_cluster, store).model_copy(update={"pools": tuple(described)}))


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_training_is_preempted_by_a_pool_and_continues_later(
    ray_cluster: RayCluster, store: ObstoreStore, pools: Any, tmp_path: Path
) -> None:
    runs = open_store(f"file://{tmp_path}/runs")
    endless = {"epochs": None, "steps": 1_000_000, "validate_every": 1_000_000}
    spec = digits_spec(
        StorageSpec(uri=runs.uri), "r", checkpoint={"every_steps": 50}, workers={"count": 2, "cpus": 2}, **endless
    )
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [sys.executable, "-m", "maas_ray.cli", "train", str(file), "--state-dir", str(ray_cluster.state_dir)]

    def newest() -> int:
        return max(list_checkpoints(runs, checkpoints_prefix("r")), default=0)

    with subprocess.Popen(command, env={**os.environ, **ray_cluster.env}) as train:
        try:
            _until(newest, "checkpoint")
            with pytest.raises(
                ResourcesMissing, match=r"not enough free resources for pool .one.: .* 4 CPU .*preempt_training"
            ):
                pools.deploy(spec_of(ray_cluster, store))
            pools.deploy(spec_of(ray_cluster, store, rollout={"preempt_training": True}))
            assert pools.status(["one"])[0].num_running == 2
            left_at = newest()
            time.sleep(3)
            assert train.poll() is None
            assert newest() == left_at  # it waits: the pool has the room
            pools.undeploy(["one"])
            _until(lambda: newest() > left_at, "checkpoint after the pool has ended")
        finally:
            train.send_signal(signal.SIGTERM)
            train.wait(120)
    first, second, *_ = Runs(runs).get("r").attempts
    assert "pool 'one' claims resources" in first["reason"]
    assert second["first_step"] == first["committed"] == left_at > 0
