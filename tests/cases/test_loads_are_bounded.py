"""24 functions, each calling the previous one twice (1.5 KB), hung `import` and, promoted, both load threads.

Required: nodes are counted with functions inlined; loads run in processes that can be killed, with a time limit; a
version that hangs is not ready, reports it, and does not block the load of other models.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from maas_ray.errors import BundleError
from maas_ray.registry import examining
from maas_ray.registry.importing import import_onnx
from maas_ray.registry.models import Registry
from maas_ray.serve.models import loader
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import app_spec, publish, serve_app
from tests.serve.models.test_manager import wait_for
from tests.support.deadly_models import ROWS, chain, doubling, endless, wide
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import resident

TOO_LARGE = {
    "doubling functions": (doubling, f"{2**24} nodes"),
    "a chain of nodes": (chain, "200001 nodes"),
    "inputs": (wide, "20001 inputs and outputs"),
}


@pytest.mark.parametrize(
    ("kind", "is_checked"),
    [("doubling functions", True), ("doubling functions", False), ("a chain of nodes", False), ("inputs", False)],
)
def test_import_refuses_graphs_that_are_too_large_at_once(
    file_store: ObstoreStore, tmp_path: Path, kind: str, is_checked: bool
) -> None:
    make, says = TOO_LARGE[kind]
    path = tmp_path / "large.onnx"
    path.write_bytes(make())
    started = time.monotonic()
    with pytest.raises(BundleError, match=says):
        import_onnx(file_store, path, is_checked=is_checked)
    assert time.monotonic() - started < 60


def test_import_ends_a_graph_that_never_ends(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examining, "WALL_S", 3.0)
    path = tmp_path / "endless.onnx"
    path.write_bytes(endless())
    with pytest.raises(BundleError, match="run for the first time .* did not end in time"):
        import_onnx(file_store, path, is_checked=False)


@pytest.mark.parametrize("make", [doubling, endless], ids=["doubling functions", "a loop without an end"])
def test_versions_that_hang_keep_no_other_model_from_following_its_alias(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]
) -> None:
    monkeypatch.setattr(loader, "FIRST_LOAD_S", 5.0)
    names = ("a", "b", "c")
    for name in names:
        publish(file_store, name, commit_bundle(file_store, linear(2.0)))
    registry = Registry(file_store)
    for server in serve_app(file_store, app_spec(file_store, *names), "protocol"):
        for number, name in enumerate(names[:2]):  # as many as there are threads that load
            bundle = commit_bundle(file_store, make(), ROWS, run=f"bad-{number}")
            registry.promote(name, registry.publish(name, bundle).version)
        time.sleep(0.3)  # both have begun
        newer = publish(file_store, "c", commit_bundle(file_store, linear(3.0)))
        wait_for(lambda: resident(server.manager, "c").version.version == newer, timeout_s=60)
        for name in names[:2]:
            wait_for(lambda name=name: server.manager.problems(name), timeout_s=60)
            ready = requests.get(f"{server.url}/v2/models/{name}/ready", timeout=60).json()
            assert ready["problems"]
            assert resident(server.manager, name).version.version == 1
        assert registry.promote("a", 1).version == 1
        wait_for(lambda: not server.manager.problems("a"), timeout_s=60)
