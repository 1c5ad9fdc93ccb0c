"""A pool on the real cluster scales up with a step in load, down after it, to zero and back, and loses no request."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import requests
from onnx import TensorProto, helper

from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore, open_store
from tests.conftest import RayCluster
from tests.serve.deploy.test_pool import Load, serve_spec
from tests.serve.http.test_asgi_app import ROW
from tests.support.onnx_models import commit_bundle, make_graph, value

pytestmark = [
    pytest.mark.fault,
    # Ray's own use of pydantic, at import, and of the sockets of its clients.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def heavy(scale: float = 2.0, size: int = 700) -> bytes:
    """y = scale * x as slowly as two products of matrices whose values depend on x."""
    model = make_graph(
        [
            helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "matrix"], ["a"]),
            helper.make_node("MatMul", ["a", "a"], ["b"]),
            helper.make_node("MatMul", ["b", "a"], ["c"]),
            helper.make_node("ReduceMax", ["c"], ["top"], keepdims=0),
            helper.make_node("Mul", ["top", "zero"], ["nothing"]),
            helper.make_node("Mul", ["x", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "nothing"], ["y"]),
        ],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        {
            "matrix": np.full((size, size), 1e-4, np.float32),
            "zero": np.float32([0.0]),
            "scale": np.float32([scale]),
        },
    )
    return model.SerializeToString()


@pytest.fixture
def heavy_store(tmp_path) -> ObstoreStore:
    store = open_store(f"file://{tmp_path}/store")
    registry = Registry(store)
    registry.publish("heavy", commit_bundle(store, heavy(), run="run-heavy"))
    registry.promote("heavy", 1)
    return store


@pytest.fixture
def no_pools_left(ray_cluster: RayCluster) -> Iterator[None]:
    from maas_ray.serve.deploy import pool

    yield
    pool.undeploy([status.name for status in pool.status()])


def wait_for_replicas(number: int, timeout_s: float) -> None:
    from maas_ray.serve.deploy import pool

    started = time.monotonic()
    while (found := pool.status(["one"])[0].num_running) != number:
        assert time.monotonic() < started + timeout_s, f"{found} replicas instead of {number}"
        time.sleep(0.1)


def wait_until_gone(timeout_s: float) -> None:
    """A replica that stops still answers for some seconds."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while any(item.replica_states for item in serve.status().applications["one"].deployments.values()):
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.1)


@pytest.mark.usefixtures("no_pools_left")
def test_a_step_in_load_adds_a_replica_and_its_end_takes_it_away(
    ray_cluster: RayCluster, heavy_store: ObstoreStore
) -> None:
    from maas_ray.serve.deploy import pool

    options = {
        "models": [{"name": "heavy"}],
        "batching": {"max_batch_size": 1},
        "replicas": {"min": 1, "max": 2},
        "autoscaling": {"target_ongoing": 4, "downscale_delay_s": 6},
    }
    pool.deploy(serve_spec(ray_cluster, heavy_store, **options))
    with Load(f"http://127.0.0.1:{ray_cluster.http_port}/one/v2/models/heavy/infer", num_clients=12) as load:
        wait_for_replicas(2, 60)
        load.wait_for("1", num_more=100)
    wait_for_replicas(1, 90)
    assert load.wrong == []


@pytest.mark.usefixtures("no_pools_left")
def test_a_sleeping_pool_is_woken_by_a_request_and_answers_it(
    ray_cluster: RayCluster, heavy_store: ObstoreStore
) -> None:
    from maas_ray.serve.deploy import pool

    options = {
        "models": [{"name": "heavy"}],
        "replicas": {"min": 0, "max": 2},
        "autoscaling": {"scale_to_zero_after_s": 4, "downscale_delay_s": 4},
    }
    pool.deploy(serve_spec(ray_cluster, heavy_store, **options))
    wait_until_gone(90)
    url = f"http://127.0.0.1:{ray_cluster.http_port}/one/v2/models/heavy/infer"
    answer = requests.post(url, json=ROW, timeout=60)
    assert (answer.status_code, answer.json()["outputs"][0]["data"]) == (200, [2.0, 4.0, 6.0])
    wait_for_replicas(1, 10)
