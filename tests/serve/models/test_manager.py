"""Following the registry: version swaps without a failed request, and broken new versions."""

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import requests

from maas_ray.errors import BundleError, MaasError, NotFound, ObjectCorrupt
from maas_ray.registry.models import Registry
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.models.registry_follower import TASK_NAME
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import Server, app_spec, publish
from tests.serve.http.test_asgi_app import ROW
from tests.support.onnx_models import LINEAR, LOOKUP, commit_bundle, linear, lookup
from tests.support.residents import HeldRuns, resident

FAST = {"poll_interval_s": 0.05}
SLOW = {"poll_interval_s": 3600.0}


def break_bundle(store: ObstoreStore, bundle: str) -> None:
    """Flips one byte of a committed graph on disk."""
    path = next(Path(store.uri.removeprefix("file://")).glob(f"bundles/{bundle}/parts-*/model.onnx"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def version_of(url: str) -> str:
    return requests.post(f"{url}/v2/models/linear/infer", json=ROW, timeout=30).headers["x-maas-version"]


def wait_for(condition: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_twenty_swaps_under_load_fail_no_request_and_mix_no_version(server: Server) -> None:
    """Every response must match the version in its header; half of the promoted versions are broken."""
    scales = {1: 2.0}
    stop = threading.Event()
    wrong: list[str] = []
    seen: Counter[str] = Counter()

    def ask() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(f"{server.url}/v2/models/linear/infer", json=ROW, timeout=30)
                version = answer.headers.get("x-maas-version", "")
                if answer.status_code != 200:
                    wrong.append(f"{answer.status_code}: {answer.text}")
                elif answer.json()["outputs"][0]["data"] != [scales[int(version)] * value for value in (1, 2, 3)]:
                    wrong.append(f"version {version}: {answer.text}")
                seen[version] += 1

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        registry = Registry(server.store)
        for turn in range(20):
            scale = 3.0 + turn
            bundle = commit_bundle(server.store, linear(scale), run=f"run-{turn}")
            if turn % 2:
                break_bundle(server.store, bundle)
            version = registry.publish("linear", bundle).version
            scales[version] = scale
            registry.promote("linear", version)
            if turn % 2:
                wait_for(lambda: f"version {version} cannot be loaded" in str(server.manager.problems("linear")))
            else:
                wait_for(lambda: seen[str(version)] > 0)
    finally:
        stop.set()
        for client in clients:
            client.join(60)
    assert wrong == []
    assert len(seen) == 11, "the first version and ten sound ones were seen, no broken one"
    wait_for(lambda: "UNLOADING" not in {row["state"] for row in server.manager.index()})


def test_a_broken_version_leaves_the_old_one_serving_and_reports_why(server: Server) -> None:
    bundle = commit_bundle(server.store, linear(9.0), run="run-b")
    break_bundle(server.store, bundle)
    publish(server.store, "linear", bundle)
    wait_for(lambda: server.manager.problems("linear"))
    assert version_of(server.url) == "1"
    ready = requests.get(f"{server.url}/v2/models/linear/ready", timeout=30).json()
    assert ready["ready"] is True
    assert "version 2 cannot be loaded" in ready["problems"][0]
    assert "sha256" in ready["problems"][0]
    metadata = requests.get(f"{server.url}/v2/models/linear", timeout=30).json()
    assert metadata["parameters"]["version"] == "1"
    assert metadata["parameters"]["problems"] == ready["problems"]
    publish(server.store, "linear", commit_bundle(server.store, linear(5.0), run="run-c"))
    wait_for(lambda: version_of(server.url) == "3")
    assert server.manager.problems("linear") == []


def test_a_version_whose_graph_differs_from_its_signature_is_never_swapped_in(server: Server) -> None:
    publish(server.store, "linear", commit_bundle(server.store, lookup(), LINEAR))
    wait_for(lambda: "declares the inputs" in str(server.manager.problems("linear")))
    assert version_of(server.url) == "1"


def test_an_unavailable_store_does_not_affect_loaded_models(server: Server) -> None:
    root = Path(server.store.uri.removeprefix("file://"))
    hidden = root.with_name("hidden")
    root.rename(hidden)
    root.write_text("a file where the directory was")
    try:
        with pytest.raises(MaasError):
            server.call(server.manager.refresh())
        assert version_of(server.url) == "1"
        server.call_plain(server.manager.check_health)
    finally:
        root.unlink()
        hidden.rename(root)
    publish(server.store, "linear", commit_bundle(server.store, linear(5.0)))
    wait_for(lambda: version_of(server.url) == "2")


def run(manager: ModelManager, *steps: object) -> None:
    async def main() -> None:
        await manager.start()
        try:
            for step in steps:
                result = step()  # type: ignore[operator]
                if asyncio.iscoroutine(result):
                    await result
        finally:
            await manager.close()

    asyncio.run(main())


def test_fixed_versions_and_aliases_of_one_model_are_served_side_by_side(file_store: ObstoreStore) -> None:
    registry = Registry(file_store)
    for scale in (1.0, 2.0, 3.0):
        registry.publish("linear", commit_bundle(file_store, linear(scale)))
    registry.promote("linear", 2)
    registry.promote("linear", 3, "canary")
    models = [{"name": "linear"}, {"name": "linear", "alias": "canary"}, {"name": "linear", "version": 1}]
    manager = ModelManager(file_store, app_spec(file_store, models=models, refresh=SLOW))

    def check_start() -> None:
        assert manager.versions("linear") == [1, 2, 3]
        assert resident(manager, "linear").version.version == 2, "the first reference is the default"
        assert resident(manager, "linear", 1).version.version == 1
        registry.promote("linear", 3)

    def check_moved() -> None:
        assert resident(manager, "linear").version.version == 3
        assert manager.versions("linear") == [1, 3], "version 2 is named by nothing any more"
        with pytest.raises(NotFound, match="unknown model: 'linear' version 2 is not found; this pool serves: 1, 3"):
            resident(manager, "linear", 2)

    run(manager, check_start, manager.refresh, check_moved)


def test_a_replica_that_starts_while_the_promoted_version_is_broken_serves_the_one_before(
    file_store: ObstoreStore,
) -> None:
    publish(file_store, "linear", commit_bundle(file_store, linear(1.0)))
    broken = commit_bundle(file_store, linear(2.0))
    break_bundle(file_store, broken)
    publish(file_store, "linear", broken)
    manager = ModelManager(file_store, app_spec(file_store, "linear", refresh=SLOW))

    def check() -> None:
        assert resident(manager, "linear").version.version == 1
        assert "version 2 cannot be loaded" in manager.problems("linear")[0]

    run(manager, check)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda store: None, NotFound, "no model 'linear'"),
        (lambda store: Registry(store).publish("linear", commit_bundle(store)), NotFound, "no alias 'production'"),
        (lambda store: publish(store, "linear", commit_bundle(store, lookup(), LINEAR)), BundleError, "declares"),
    ],
)
def test_a_replica_that_can_serve_nothing_does_not_start_and_reports_why(
    file_store: ObstoreStore, prepare: object, error: type[MaasError], message: str
) -> None:
    prepare(file_store)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        run(ModelManager(file_store, app_spec(file_store, "linear")))


def test_an_altered_graph_does_not_start(file_store: ObstoreStore) -> None:
    bundle = commit_bundle(file_store)
    publish(file_store, "linear", bundle)
    break_bundle(file_store, bundle)
    with pytest.raises(ObjectCorrupt, match="sha256"):
        run(ModelManager(file_store, app_spec(file_store, "linear")))


def test_a_promotion_to_another_signature_is_served_by_the_new_one(file_store: ObstoreStore) -> None:
    publish(file_store, "m", commit_bundle(file_store))
    manager = ModelManager(file_store, app_spec(file_store, "m", refresh=SLOW))

    def promote() -> None:
        publish(file_store, "m", commit_bundle(file_store, lookup(), LOOKUP))

    def check() -> None:
        assert resident(manager, "m").info.signature.inputs == LOOKUP.inputs

    run(manager, promote, manager.refresh, check)


def test_health_names_a_run_that_hangs_and_a_follower_that_ended(file_store: ObstoreStore) -> None:
    publish(file_store, "linear", commit_bundle(file_store))
    manager = ModelManager(
        file_store, app_spec(file_store, "linear", refresh={**SLOW, "stuck_run_s": 0.01}, limits={"timeout_s": 0.01})
    )

    async def hang() -> None:
        manager.check_health()
        model = resident(manager, "linear")
        held, answers = HeldRuns(model), list[object]()
        deadline = asyncio.get_running_loop().time() + 20
        model.batcher.submit({"x": np.ones((1, 3), np.float32)}, 1, 12, deadline, lambda *each: answers.append(each))
        while model.batcher.busy_s <= 0.01:
            await asyncio.sleep(0.001)
        with pytest.raises(MaasError, match="running one batch for 0 s"):
            manager.check_health()
        held.release()
        while not answers:
            await asyncio.sleep(0.001)
        manager.check_health()

    async def end_follower() -> None:
        (follower,) = [task for task in asyncio.all_tasks() if task.get_name() == TASK_NAME]
        follower.cancel()
        await asyncio.wait({follower})
        with pytest.raises(MaasError, match="no longer follows"):
            manager.check_health()

    run(manager, hang, end_follower)
