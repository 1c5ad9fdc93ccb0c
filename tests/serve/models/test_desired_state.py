"""Load and unload requests of clients: recorded once for all replicas, without harm to the models that serve."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from maas_ray.errors import BadRequest, BundleError, DeadlineExceeded, MaasError, NotFound, SpecError
from maas_ray.registry.models import Registry
from maas_ray.serve.models.desired_state import DesiredModel, DesiredState
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.spec.pools import ServedModelSpec
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import app_spec, publish
from tests.serve.models.conftest import SlowEngine
from tests.serve.models.test_manager import SLOW, break_bundle
from tests.serve.models.test_many_models import ask, in_memory, publish_many
from tests.support.onnx_models import LINEAR, commit_bundle, linear, lookup
from tests.support.residents import HeldRuns, resident


def explicit(store: ObstoreStore, *names: str, pool: str = "p", **more: Any) -> ModelManager:
    spec = app_spec(store, *names, refresh=SLOW, model_control="explicit", **more)
    return ModelManager(store, spec, pool=pool)


def play(scene: Callable[[], Awaitable[None]], *managers: ModelManager) -> None:
    async def main() -> None:
        try:
            for manager in managers:
                await manager.start()
            await asyncio.wait_for(scene(), 30)
        finally:
            for manager in managers:
                await manager.close()

    asyncio.run(main())


def states(manager: ModelManager) -> dict[tuple[str, str], str]:
    return {(row["name"], row["version"]): row["state"] for row in manager.index()}


# The log


def test_the_last_event_of_a_model_counts_and_the_same_one_is_written_once(file_store: ObstoreStore) -> None:
    wanted = DesiredState(file_store, "p")
    assert wanted.models() == {}
    wanted.load("a")
    wanted.load("a")
    wanted.unload("b")
    wanted.load("a", ServedModelSpec(name="a", version=3))
    wanted.load("c", ServedModelSpec(name="c", alias="canary"))
    wanted.unload("c")
    expected = {
        "a": DesiredModel(3, True, ServedModelSpec(name="a", version=3)),
        "b": DesiredModel(2, False),
        "c": DesiredModel(5, False),
    }
    assert DesiredState(file_store, "p").models() == wanted.models() == expected
    assert DesiredState(file_store, "other").models() == {}


def test_desired_models_are_records_that_fsck_knows(file_store: ObstoreStore) -> None:
    DesiredState(file_store, "p").load("a")
    report = fsck(file_store)
    assert (report.num_records, report.problems, report.foreign) == (1, [], [])


def test_a_pool_whose_name_cannot_be_a_key_is_refused(file_store: ObstoreStore) -> None:
    with pytest.raises(SpecError, match="not a valid name"):
        DesiredState(file_store, "../registry")


# Load and unload


def test_a_model_that_the_spec_does_not_list_is_served_once_it_is_asked_for(file_store: ObstoreStore) -> None:
    publish_many(file_store, "listed", "other")
    manager = explicit(file_store, "listed")

    async def scene() -> None:
        with pytest.raises(NotFound, match="this pool serves: listed"):
            manager.find("other")
        await manager.load("other")
        assert in_memory(manager) == ["listed", "other"]
        assert (await ask(manager, "other")).tolist() == [[2.0, 2.0, 2.0]]
        publish(file_store, "other", commit_bundle(file_store, linear(3.0)))
        await manager.refresh()
        assert (await ask(manager, "other")).tolist() == [[3.0, 3.0, 3.0]], "it is followed as any other"

    play(scene, manager)


def test_an_unloaded_model_is_gone_until_it_is_loaded_again(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b")
    manager = explicit(file_store, "a", "b")

    async def scene() -> None:
        await manager.unload("a")
        with pytest.raises(NotFound, match="'a' is not found; it was unloaded"):
            manager.find("a")
        assert states(manager) == {("a", ""): "UNAVAILABLE", ("b", "1"): "READY"}
        assert manager.is_ready, "the pool itself is"
        await manager.refresh()
        with pytest.raises(NotFound):
            await manager.unload("a")
        await manager.load("a")
        assert (await ask(manager, "a")).tolist() == [[2.0, 2.0, 2.0]]
        assert states(manager) == {("a", "1"): "READY", ("b", "1"): "READY"}

    play(scene, manager)


def test_unloading_waits_for_the_last_answer_with_a_time_limit(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    manager = explicit(file_store, "a")

    async def scene() -> None:
        answers: list[Any] = []
        model = resident(manager, "a")
        batcher, held = model.batcher, HeldRuns(model)
        deadline = asyncio.get_running_loop().time() + 20
        batcher.submit({"x": np.ones((1, 3), np.float32)}, 1, 12, deadline, lambda *args: answers.append(args))
        while not held.runs:
            await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="has some unanswered"):
            await manager.unload("a", timeout_s=0.05)
        assert states(manager) == {("a", "1"): "UNLOADING", ("a", ""): "UNAVAILABLE"}
        held.release()
        assert answers[0][0]["y"].tolist() == [[2.0, 2.0, 2.0]]
        await asyncio.sleep(0.001)
        assert states(manager) == {("a", ""): "UNAVAILABLE"}

    play(scene, manager)


def test_a_version_that_a_caller_asks_for_answers_urls_without_one(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    publish(file_store, "a", commit_bundle(file_store, linear(3.0)))
    manager = explicit(file_store, "a")

    async def scene() -> None:
        await manager.load("a", version=1)
        assert (await ask(manager, "a")).tolist() == [[2.0, 2.0, 2.0]]
        assert manager.versions("a") == [1, 2], "the version in the spec is served as well"
        await manager.load("a")
        assert (await ask(manager, "a")).tolist() == [[3.0, 3.0, 3.0]]
        assert manager.versions("a") == [2]

    play(scene, manager)


def test_a_broken_version_is_refused_and_the_previous_one_continues(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    registry = Registry(file_store)
    bundle = commit_bundle(file_store, lookup(), LINEAR)
    registry.publish("a", bundle)
    manager = explicit(file_store, "a")

    async def scene() -> None:
        with pytest.raises(BundleError, match="declares the inputs"):
            await manager.load("a", version=2)
        assert (await ask(manager, "a")).tolist() == [[2.0, 2.0, 2.0]]
        registry.promote("a", 2)
        with pytest.raises(BundleError, match="declares the inputs"):
            await manager.load("a")
        assert (await ask(manager, "a")).tolist() == [[2.0, 2.0, 2.0]]
        rows = {row["version"]: row for row in manager.index()}
        assert rows["1"]["state"] == "READY"
        assert rows["2"]["state"] == "UNAVAILABLE"
        assert "declares the inputs" in rows["2"]["reason"]

    play(scene, manager)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "no model 'nothing'"),
        ("a", {"version": 7}, "no version 7 of model 'a'"),
        ("a", {"alias": "canary"}, "no alias 'canary'"),
        ("unpromoted", {}, "no alias 'production' of model 'unpromoted'"),
    ],
)
def test_what_the_registry_does_not_have_is_not_written_down(
    file_store: ObstoreStore, name: str, options: dict[str, Any], message: str
) -> None:
    publish_many(file_store, "a")
    Registry(file_store).publish("unpromoted", commit_bundle(file_store))
    manager = explicit(file_store, "a")

    async def scene() -> None:
        with pytest.raises(NotFound, match=message):
            await manager.load(name, **options)
        assert DesiredState(file_store, "p").models() == {}

    play(scene, manager)


def test_a_pool_without_explicit_control_refuses_both_with_the_way_out(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    manager = ModelManager(file_store, app_spec(file_store, "a", refresh=SLOW))

    async def scene() -> None:
        for call in (manager.load, manager.unload):
            with pytest.raises(BadRequest, match="set it to explicit"):
                await call("a")
        assert states(manager) == {("a", "1"): "READY"}

    play(scene, manager)


# Several replicas


def test_all_replicas_of_a_pool_follow_and_other_pools_do_not(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b")
    first, second, other = (explicit(file_store, "a", pool=pool) for pool in ("p", "p", "q"))

    async def scene() -> None:
        await first.load("b")
        await first.unload("a")
        for manager in (second, other):
            await manager.refresh()
        assert (in_memory(second), in_memory(other)) == (["b"], ["a"])

    play(scene, first, second, other)


def test_a_replica_that_starts_later_knows_the_desired_models(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b", "c")
    wanted = DesiredState(file_store, "p")
    wanted.load("b")
    wanted.unload("c")
    bundle = commit_bundle(file_store, linear(9.0))
    break_bundle(file_store, bundle)
    publish(file_store, "broken", bundle)
    wanted.load("broken")
    manager = explicit(file_store, "a", "c")

    async def scene() -> None:
        assert in_memory(manager) == ["a", "b"]
        assert "cannot be loaded" in manager.problems("broken")[0], (
            "a desired model does not stop a replica from starting"
        )

    play(scene, manager)


def test_a_request_that_waits_for_a_model_being_unloaded_gets_an_error(
    file_store: ObstoreStore, slow: type[SlowEngine]
) -> None:
    publish_many(file_store, "a", "b")
    manager = explicit(file_store, models=[{"name": "*"}])

    async def scene() -> None:
        told: list[MaasError | None] = []
        loop = asyncio.get_running_loop()
        manager.load_soon("a", None, loop.time() + 20, lambda _, error: told.append(error))
        while not slow.begun:
            await asyncio.sleep(0.001)
        await manager.unload("a")
        slow.gate.set()
        while not told:
            await asyncio.sleep(0.001)
        assert isinstance(told[0], NotFound)
        assert in_memory(manager) == []
        assert manager.memory_bytes == 0

    play(scene, manager)
