"""Pools on a real Ray cluster behind HAProxy: failed starts, refusals, and a file for `serve deploy`."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from maas_ray.errors import ClusterError, NotFound
from maas_ray.registry.models import Registry
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore, open_store
from tests.conftest import RayCluster
from tests.serve.conftest import publish
from tests.serve.http.test_asgi_app import ROW
from tests.support.onnx_models import commit_bundle, linear
from tests.support.root import ROOT

pytestmark = [
    # Ray's own use of pydantic, at import, and of the sockets of its clients.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def pool_store(tmp_path_factory: pytest.TempPathFactory) -> ObstoreStore:
    """A store that outlives one test; `linear` is published in versions 1 (y = 2x) and 2 (y = 3x)."""
    store = open_store(f"file://{tmp_path_factory.mktemp('pool')}/store")
    registry = Registry(store)
    for scale in (2.0, 3.0):
        registry.publish("linear", commit_bundle(store, linear(scale), run=f"run-{scale:g}"))
    registry.promote("linear", 1)
    return store


def serve_spec(ray_cluster: RayCluster, store: ObstoreStore, **pool: Any) -> ServeSpec:
    described = {
        "name": "one",
        "route_prefix": "/one",
        "models": [{"name": "linear"}],
        "resources": {"cpus": 0.5},
        "refresh": {"poll_interval_s": 0.2},
        **pool,
    }
    front = {"port": ray_cluster.http_port}
    return parse_spec(ServeSpec, {"storage": {"uri": store.uri}, "http": front, "pools": [described]})


class Load:
    """Clients in the background; every response must match its version."""

    def __init__(self, url: str, num_clients: int = 3) -> None:
        self.url = url
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def _ask(self) -> None:
        with requests.Session() as session:
            while not self._stop.is_set():
                try:
                    answer = session.post(self.url, json=ROW, timeout=30)
                except requests.RequestException as error:
                    self.wrong.append(repr(error))
                    continue
                version = answer.headers.get("x-maas-version", "0")
                scale = 1.0 + int(version)
                if answer.status_code != 200:
                    self.wrong.append(f"{answer.status_code} {answer.text}")
                elif answer.json()["outputs"][0]["data"] != [scale * value for value in (1, 2, 3)]:
                    self.wrong.append(f"version {version}: {answer.text}")
                self.seen[version] += 1

    def wait_for(self, version: str, num_more: int = 50) -> None:
        target = self.seen[version] + num_more
        deadline = time.monotonic() + 60
        while self.seen[version] < target:
            assert time.monotonic() < deadline, f"version {version} did not answer: {self.seen} {self.wrong[:3]}"
            time.sleep(0.02)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture
def no_pools_left(ray_cluster: RayCluster) -> Iterator[None]:
    from maas_ray.serve.deploy import pool

    yield
    pool.undeploy([status.name for status in pool.status()])


@pytest.mark.usefixtures("no_pools_left")
def test_a_pool_that_cannot_start_reports_why_in_the_replicas_words(
    ray_cluster: RayCluster, pool_store: ObstoreStore
) -> None:
    from maas_ray.serve.deploy import pool

    bundle = commit_bundle(pool_store, linear(7.0), run="broken")
    graph = next(Path(pool_store.uri.removeprefix("file://")).glob(f"bundles/{bundle}/parts-*/model.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    publish(pool_store, "broken", bundle)
    with pytest.raises(ClusterError, match="pool 'one' .*model.onnx has .* bytes instead of"):
        pool.deploy(serve_spec(ray_cluster, pool_store, models=[{"name": "broken"}]), timeout_s=90)


def test_an_invalid_deployment_is_refused_before_anything_starts(
    ray_cluster: RayCluster, pool_store: ObstoreStore
) -> None:
    from maas_ray.serve.deploy import pool

    with pytest.raises(NotFound, match="no model 'nobody'.*linear"):
        pool.deploy(serve_spec(ray_cluster, pool_store, models=[{"name": "nobody"}]))
    portable = serve_spec(ray_cluster, pool_store).model_copy(update={"profile": "portable"})
    with pytest.raises(ClusterError, match="profile 'portable', the cluster was started with 'fast'"):
        pool.deploy(portable)


@pytest.mark.fault  # a minute; the commands of the tutorial and the test above deploy pools in CI
@pytest.mark.usefixtures("no_pools_left")
def test_serve_deploy_takes_the_file_of_the_repository(
    ray_cluster: RayCluster, pool_store: ObstoreStore, tmp_path: Path
) -> None:
    from maas_ray.serve.deploy import pool

    config = yaml.safe_load((ROOT / "deployments" / "pools.yaml").read_text())
    # Serve takes these when it starts, and later tests of this cluster deploy on loopback.
    config["http_options"] |= {"host": "127.0.0.1", "port": ray_cluster.http_port}
    arguments = config["applications"][0]["args"]
    arguments["storage"]["uri"] = pool_store.uri
    arguments["models"] = [{"name": "linear", "version": 1}]
    file = tmp_path / "pools.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {**os.environ, **ray_cluster.env}
    serve = Path(sys.executable).with_name("serve")
    done = subprocess.run(
        [serve, "deploy", "-a", ray_cluster.dashboard_url, file],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 120
    while [status.status for status in pool.status(["default"])] != ["RUNNING"]:
        assert time.monotonic() < deadline, pool.status()
        assert "DEPLOY_FAILED" not in [status.status for status in pool.status()], pool.status()
        time.sleep(0.2)
    answer = None
    while answer is None or answer.status_code != 200:
        assert time.monotonic() < deadline, answer and answer.text
        try:
            url = f"http://127.0.0.1:{ray_cluster.http_port}/v2/models/linear/infer"
            answer = requests.post(url, json=ROW, timeout=10)
        except requests.RequestException:  # the front starts concurrently with the pool
            time.sleep(0.2)
    assert answer.headers["x-maas-version"] == "1"
