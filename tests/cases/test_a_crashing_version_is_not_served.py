"""A tree ensemble 20,000 deep makes onnxruntime overrun its stack; promoted, it took the pool down permanently.

Required: every first load is in a child process. `import` refuses the file with the reason, with and without its check;
a replica reports such a version, its previous one continues to serve, and a pool starts with one such model.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from maas_ray.cluster.health.unavailable import unavailable
from maas_ray.errors import BundleError, ConfinedKilled
from maas_ray.registry.importing import import_onnx
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore, open_store
from tests.conftest import unused_port
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.serve.models.test_manager import wait_for
from tests.support.deadly_models import DEEP_TREE, deep_tree, of_unknown_version
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import resident

ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A pool of two models, one of which kills the process that loads it, from the start."""
    store = open_store(f"file://{tmp_path_factory.mktemp('a2')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "deep", commit_bundle(store, deep_tree(), DEEP_TREE))
    yield from serve_app(store, app_spec(store, "linear", "deep"), "protocol")


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "without the check"])
def test_import_survives_and_refuses_what_kills(file_store: ObstoreStore, tmp_path: Path, is_checked: bool) -> None:
    path = tmp_path / "deep.onnx"
    path.write_bytes(deep_tree())
    with pytest.raises(BundleError, match="loaded into a session died .*SIGSEGV") as caught:
        import_onnx(file_store, path, is_checked=is_checked)
    assert isinstance(caught.value.__cause__, ConfinedKilled)
    assert caught.value.__cause__.signal == signal.SIGSEGV


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "without the check"])
def test_import_makes_a_session_always(file_store: ObstoreStore, tmp_path: Path, is_checked: bool) -> None:
    path = tmp_path / "future.onnx"
    path.write_bytes(of_unknown_version(linear()))
    with pytest.raises(BundleError, match=r"(?i)ir.version"):
        import_onnx(file_store, path, is_checked=is_checked)


def test_a_pool_starts_although_one_of_its_models_kills(server: Server) -> None:
    assert requests.post(f"{server.url}/v2/models/linear/infer", json=ROW, timeout=60).status_code == 200
    ready = requests.get(f"{server.url}/v2/models/deep/ready", timeout=60)
    assert ready.status_code == 503
    assert "SIGSEGV" in str(ready.json()["problems"])
    index = {row["name"]: row for row in requests.post(f"{server.url}/v2/repository/index", json={}, timeout=60).json()}
    assert (index["linear"]["state"], index["deep"]["state"]) == ("READY", "UNAVAILABLE")
    assert "SIGSEGV" in index["deep"]["reason"]
    answer = requests.post(f"{server.url}/v2/models/deep/infer", json=ROW, timeout=60)
    assert answer.status_code == 422
    (line,) = unavailable(server.url, "/", 60)  # what `serve` and `status` print
    assert line.startswith("deep version 1: ")
    assert "SIGSEGV" in line


def test_a_silent_server_or_another_application_has_no_unavailable_models(server: Server) -> None:
    assert unavailable(server.url, "/elsewhere", 60) == ()
    assert unavailable(f"http://127.0.0.1:{unused_port()}", "/", 60) == ()


def test_a_promoted_version_that_kills_leaves_the_old_one_serving(server: Server) -> None:
    registry = Registry(server.store)
    bad = registry.publish("linear", commit_bundle(server.store, deep_tree(20_001), DEEP_TREE)).version
    registry.promote("linear", bad)
    wait_for(lambda: "SIGSEGV" in str(server.manager.problems("linear")), timeout_s=60)
    answer = requests.post(f"{server.url}/v2/models/linear/infer", json=ROW, timeout=60)
    assert answer.json()["outputs"][0]["data"] == [2, 4, 6]
    better = publish(server.store, "linear", commit_bundle(server.store, linear(3.0)))
    wait_for(lambda: resident(server.manager, "linear").version.version == better, timeout_s=60)
