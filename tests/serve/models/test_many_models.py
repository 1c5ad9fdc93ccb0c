"""More models than memory: requests that wait for a load, eviction, and the limits of every wait."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from maas_ray.errors import DeadlineExceeded, MaasError, ModelTooLarge, NotFound, Overloaded
from maas_ray.registry.models import Registry
from maas_ray.serve.models import memory_budget
from maas_ray.serve.models.loaded import Loaded, memory_of
from maas_ray.serve.models.manager import ModelManager
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import app_spec, publish
from tests.serve.models.conftest import SlowEngine
from tests.serve.models.test_manager import SLOW, break_bundle
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import HeldRuns, resident

SIZE = memory_of(len(linear()))


@pytest.fixture(autouse=True)
def _no_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "MIN_STAY_S", 0.0)


def manager_of(store: ObstoreStore, *names: str, room_for: int | None = None, **more: Any) -> ModelManager:
    models = [{"name": name} for name in names]
    budget = {} if room_for is None else {"memory_budget_bytes": room_for * SIZE + SIZE // 2}
    return ModelManager(store, app_spec(store, **{"models": models, "refresh": SLOW, **budget, **more}))


def publish_many(store: ObstoreStore, *names: str) -> None:
    registry, bundle = Registry(store), commit_bundle(store)
    for name in names:
        registry.promote(name, registry.publish(name, bundle).version)


def play(manager: ModelManager, scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await manager.start()
        try:
            await asyncio.wait_for(scene(), 30)
        finally:
            await manager.close()
        assert manager.memory_bytes == 0, "everything was released"

    asyncio.run(main())


async def loaded(manager: ModelManager, name: str, version: int | None = None, timeout_s: float = 20.0) -> Loaded:
    """As a handler does: the model if it is there, else after its load."""
    found = manager.find(name, version)
    if found is not None:
        return found
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Loaded] = loop.create_future()

    def done(answer: Loaded | None, error: MaasError | None) -> None:
        assert not future.done(), "called once"
        if answer is not None:
            future.set_result(answer)
        else:
            future.set_exception(error or AssertionError("neither a model nor an error"))

    waiter = manager.load_soon(name, version, loop.time() + timeout_s, done)
    try:
        return await future
    finally:
        waiter.cancel()


async def ask(manager: ModelManager, name: str) -> np.ndarray:
    """One request, queued in the turn of the loop in which the model is there."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def answered(outputs: Any, error: MaasError | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(outputs["y"])

    def ready(found: Loaded | None, error: MaasError | None) -> None:
        if found is None:
            answered(None, error)
        else:
            found.batcher.submit({"x": np.ones((1, 3), np.float32)}, 1, 12, loop.time() + 20, answered)

    found = manager.find(name)
    if found is not None:
        ready(found, None)
    else:
        manager.load_soon(name, None, loop.time() + 20, ready)
    return np.asarray(await future)


def counts(manager: ModelManager) -> tuple[int, int]:
    """Loads and evictions so far."""
    models = manager.stats.snapshot()["models"]
    return sum(model["loads"] for model in models), sum(model["evictions"] for model in models)


def in_memory(manager: ModelManager) -> list[str]:
    """Names of the models that serve requests without a load."""
    return sorted(row["name"] for row in manager.index() if (row["state"], row["reason"]) == ("READY", ""))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# The budget


def test_two_hundred_models_are_served_with_memory_for_twenty(file_store: ObstoreStore) -> None:
    """Random access by 16 concurrent clients; no request fails, and the budget is never exceeded."""
    names = [f"m{number:03}" for number in range(200)]
    publish_many(file_store, *names)
    manager = manager_of(file_store, "*", room_for=20)
    choose = random.Random(7)
    most = 0

    async def caller() -> None:
        nonlocal most
        for _ in range(40):
            # Some models get more requests than others, as usual.
            name = names[min(int(choose.expovariate(1 / 30)), 199)]
            assert (await ask(manager, name)).tolist() == [[2.0, 2.0, 2.0]]
            most = max(most, manager.memory_bytes)

    async def scene() -> None:
        assert in_memory(manager) == [], "a model matched by a pattern is loaded by its first request"
        assert len(manager.names) == 200
        await asyncio.gather(*(caller() for _ in range(16)))
        loads, evictions = counts(manager)
        assert loads == evictions + len(in_memory(manager))
        assert 20 < loads < 640
        assert len(in_memory(manager)) == 20
        assert most <= manager.spec.memory_budget_bytes

    play(manager, scene)


def test_the_model_not_asked_for_longest_gives_way(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b", "c", "d")
    manager = manager_of(file_store, "a", "b", "c", "d", room_for=3)

    async def scene() -> None:
        assert in_memory(manager) == ["a", "b", "c"], "the first that fit are loaded at start"
        assert manager.is_ready
        for name in ("b", "c", "a"):  # they were loaded two at a time, in no certain order
            manager.find(name)
        await loaded(manager, "d")
        assert in_memory(manager) == ["a", "c", "d"]
        assert manager.find("b") is None

    play(manager, scene)


def test_without_a_budget_every_listed_model_stays_loaded(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b", "c")
    manager = manager_of(file_store, "a", "b", "c")

    async def scene() -> None:
        assert in_memory(manager) == ["a", "b", "c"]
        assert counts(manager) == (3, 0)

    play(manager, scene)


def test_a_pinned_model_is_loaded_first_and_never_gives_way(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b", "c", "pinned")
    models = [{"name": "a"}, {"name": "pinned", "pinned": True}, {"name": "*"}]
    manager = manager_of(file_store, room_for=2, models=models)

    async def scene() -> None:
        assert in_memory(manager) == ["a", "pinned"]
        for name in ("b", "c", "a", "b"):
            await loaded(manager, name)
            assert in_memory(manager) == sorted([name, "pinned"])

    play(manager, scene)


def test_a_busy_model_never_gives_way(file_store: ObstoreStore) -> None:
    """Not even the least recently used one; a new model waits until there is an idle one."""
    publish_many(file_store, "busy", "idle", "new", "newer")
    manager = manager_of(file_store, "busy", "idle", "*", room_for=2)

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        answers: list[Any] = []
        busy = await loaded(manager, "busy")
        held = HeldRuns(busy)
        row = {"x": np.ones((1, 3), np.float32)}
        busy.batcher.submit(row, 1, 12, loop.time() + 20, lambda *args: answers.append(args))
        await until(lambda: held.runs)
        manager.find("idle")
        await loaded(manager, "new")
        assert in_memory(manager) == ["busy", "new"]
        await asyncio.sleep(0.001)
        manager.find("new").batcher.submit({"x": np.ones((1, 3), np.float32)}, 1, 12, loop.time() + 20, lambda *_: 0)
        newer = asyncio.ensure_future(loaded(manager, "newer"))
        await newer
        assert in_memory(manager) == ["busy", "newer"]
        held.release()
        await until(lambda: answers)
        assert answers[0][0]["y"].tolist() == [[2.0, 2.0, 2.0]], "it answered although it was the oldest"

    play(manager, scene)


def test_while_every_model_is_in_use_a_cold_one_waits_and_gets_the_reason(file_store: ObstoreStore) -> None:
    publish_many(file_store, "busy", "cold")
    manager = manager_of(file_store, "busy", "*", room_for=1)

    async def scene() -> None:
        busy = await loaded(manager, "busy")
        held = HeldRuns(busy)
        deadline = asyncio.get_running_loop().time() + 20
        busy.batcher.submit({"x": np.ones((1, 3), np.float32)}, 1, 12, deadline, lambda *_: None)
        await until(lambda: held.runs)
        with pytest.raises(DeadlineExceeded, match="every model in memory is in use"):
            await loaded(manager, "cold", timeout_s=0.1)
        waiting = asyncio.ensure_future(loaded(manager, "cold"))
        await asyncio.sleep(0.05)
        assert in_memory(manager) == ["busy"]
        held.release()
        await waiting
        assert in_memory(manager) == ["cold"]

    play(manager, scene)


def test_a_model_larger_than_the_budget_is_refused_at_once(file_store: ObstoreStore) -> None:
    publish_many(file_store, "small")
    publish(file_store, "large", commit_bundle(file_store, linear() + b"\x42\x00" * 0, run="r2"))
    manager = manager_of(file_store, "small", "*", memory_budget_bytes=SIZE - 1)
    with pytest.raises(ModelTooLarge, match=f"needs {SIZE} bytes of memory, the pool's budget is {SIZE - 1}; raise"):
        play(manager, lambda: asyncio.sleep(0))
    manager = manager_of(file_store, "*", memory_budget_bytes=SIZE - 1)

    async def scene() -> None:
        with pytest.raises(ModelTooLarge, match="raise memory_budget_bytes"):
            await loaded(manager, "small")

    play(manager, scene)


def test_the_memory_of_pinned_models_is_not_available_to_others(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "pinned")
    models = [{"name": "pinned", "pinned": True}, {"name": "*"}]
    manager = manager_of(file_store, room_for=1, models=models)

    async def scene() -> None:
        with pytest.raises(ModelTooLarge, match=f"pinned models use {SIZE}"):
            await loaded(manager, "a")

    play(manager, scene)


def test_a_swap_is_made_although_both_versions_do_not_fit(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, "a", room_for=1)

    async def scene() -> None:
        publish(file_store, "a", commit_bundle(file_store, linear(3.0)))
        await manager.refresh()
        assert resident(manager, "a").version.version == 2
        assert manager.memory_bytes <= manager.spec.memory_budget_bytes

    play(manager, scene)


# Waiting


def test_requests_for_one_cold_model_share_one_load(file_store: ObstoreStore, slow: type[SlowEngine]) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, "*")

    async def scene() -> None:
        callers = [asyncio.ensure_future(ask(manager, "a")) for _ in range(30)]
        await until(lambda: slow.begun)
        assert manager.index() == [
            {"name": "a", "version": "1", "state": "LOADING", "reason": "30 requests wait for it"}
        ]
        slow.gate.set()
        await asyncio.gather(*callers)
        assert len(slow.begun) == 1
        assert counts(manager) == (1, 0)

    play(manager, scene)


def test_different_models_load_at_the_same_time_up_to_the_bound(
    file_store: ObstoreStore, slow: type[SlowEngine]
) -> None:
    names = [f"m{number}" for number in range(6)]
    publish_many(file_store, *names)
    manager = manager_of(file_store, "*", refresh={**SLOW, "max_parallel_loads": 3})

    async def scene() -> None:
        callers = [asyncio.ensure_future(ask(manager, name)) for name in names]
        await until(lambda: len(slow.begun) == 3)
        await asyncio.sleep(0.05)
        assert len(slow.begun) == 3
        slow.gate.set()
        await asyncio.gather(*callers)
        assert slow.most_at_once == 3
        assert len(slow.begun) == 6

    play(manager, scene)


def test_waiters_are_bounded_in_number_and_bytes(file_store: ObstoreStore, slow: type[SlowEngine]) -> None:
    publish_many(file_store, "a", "b")
    manager = manager_of(
        file_store, "*", batching={"max_queued_requests": 3, "max_queued_bytes": 100}, limits={"max_body_bytes": 100}
    )

    async def scene() -> None:
        deadline = asyncio.get_running_loop().time() + 20
        outcomes: list[Any] = []

        def wait(name: str, num_bytes: int = 10) -> Any:
            return manager.load_soon(name, None, deadline, lambda *answer: outcomes.append(answer), num_bytes=num_bytes)

        waiters = [wait("a") for _ in range(3)]
        with pytest.raises(Overloaded, match="3 requests wait for it, the limit is 3"):
            wait("a")
        with pytest.raises(Overloaded, match="30 bytes wait, this request has 71, the limit is 100"):
            wait("b", 71)
        waiters[0].cancel()
        waiters[0].cancel()
        wait("a", 80)
        slow.gate.set()
        await until(lambda: len(outcomes) == 3)
        assert all(error is None for _, error in outcomes)
        assert manager.budget.used == 0

    play(manager, scene)


def test_a_waiter_that_leaves_or_whose_time_is_up_does_not_stop_the_others(
    file_store: ObstoreStore, slow: type[SlowEngine]
) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, "*")

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        told: list[str] = []
        leaving = manager.load_soon("a", None, loop.time() + 20, lambda *_: told.append("left"))
        manager.load_soon("a", None, loop.time() + 0.02, lambda found, error: told.append(type(error).__name__))
        staying = asyncio.ensure_future(loaded(manager, "a"))
        await until(lambda: slow.begun)
        leaving.cancel()
        await until(lambda: told)
        slow.gate.set()
        assert (await staying).version.model == "a"
        assert told == ["DeadlineExceeded"]
        with pytest.raises(DeadlineExceeded, match="passed before"):
            manager.load_soon("a", None, loop.time() - 1, lambda *_: None)

    play(manager, scene)


def test_a_load_without_waiting_requests_is_not_started(file_store: ObstoreStore, slow: type[SlowEngine]) -> None:
    publish_many(file_store, "a", "b", "c")
    manager = manager_of(file_store, "*", refresh={**SLOW, "max_parallel_loads": 1})

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        first = asyncio.ensure_future(loaded(manager, "a"))
        await until(lambda: slow.begun)
        gone = manager.load_soon("b", None, loop.time() + 20, lambda *_: None)
        last = asyncio.ensure_future(loaded(manager, "c"))
        await asyncio.sleep(0.01)
        gone.cancel()
        slow.gate.set()
        await asyncio.gather(first, last)
        assert in_memory(manager) == ["a", "c"]
        assert len(slow.begun) == 2
        assert (await loaded(manager, "b")).version.model == "b", "later it is loaded as any other"

    play(manager, scene)


def test_a_callback_that_fails_takes_no_other_answer_with_it(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, "*")

    async def scene() -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("a caller's own fault")

        manager.load_soon("a", None, asyncio.get_running_loop().time() + 20, fail)
        assert (await loaded(manager, "a")).version.model == "a"

    play(manager, scene)


def test_a_stopping_replica_answers_requests_that_wait_for_a_load(
    file_store: ObstoreStore, slow: type[SlowEngine]
) -> None:
    publish_many(file_store, "a", "b")
    manager = manager_of(file_store, "*", refresh={**SLOW, "max_parallel_loads": 1})

    async def main() -> None:
        await manager.start()
        first, second = (asyncio.ensure_future(ask(manager, name)) for name in ("a", "b"))
        await until(lambda: slow.begun)
        closing = asyncio.ensure_future(manager.close(0.05))
        with pytest.raises(Overloaded, match="is stopping"):
            await second
        with pytest.raises(Overloaded, match="is stopping"):
            await first
        with pytest.raises(Overloaded, match="is stopping"):
            manager.find("a")
        slow.gate.set()
        await closing

    asyncio.run(main())


def test_a_replica_that_drains_finishes_the_loads_that_are_waited_for(
    file_store: ObstoreStore, slow: type[SlowEngine]
) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, "*")

    async def main() -> None:
        await manager.start()
        answer = asyncio.ensure_future(ask(manager, "a"))
        await until(lambda: slow.begun)
        closing = asyncio.ensure_future(manager.close(20))
        await asyncio.sleep(0.01)
        slow.gate.set()
        assert (await answer).tolist() == [[2.0, 2.0, 2.0]]
        await closing

    asyncio.run(main())


def test_a_load_that_is_late_is_not_begun_twice(file_store: ObstoreStore, slow: type[SlowEngine]) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, "*", refresh={**SLOW, "load_timeout_s": 1.0})

    async def scene() -> None:
        with pytest.raises(MaasError, match=r"access to model 'a' version 1 in the store took longer than 1 s"):
            await loaded(manager, "a")
        await manager.refresh()  # ends the pause after the failure: the store is available
        again = asyncio.ensure_future(loaded(manager, "a"))
        await asyncio.sleep(0)
        slow.gate.set()
        assert (await again).version.version == 1
        assert len(slow.begun) == 1

    play(manager, scene)


# Versions


def test_an_alias_that_moves_while_a_model_is_cold_is_followed_by_its_next_load(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b")
    manager = manager_of(file_store, "a", "b", room_for=1)

    async def scene() -> None:
        publish(file_store, "b", commit_bundle(file_store, linear(3.0)))
        await manager.refresh()
        assert in_memory(manager) == ["a"], "following the registry loads no cold model"
        assert manager.versions("b") == [2]
        assert (await ask(manager, "b")).tolist() == [[3.0, 3.0, 3.0]]

    play(manager, scene)


def test_a_broken_version_of_a_cold_model_is_answered_by_the_one_before_it(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a", "b")
    broken = commit_bundle(file_store, linear(5.0))
    break_bundle(file_store, broken)
    publish(file_store, "b", broken)
    manager = manager_of(file_store, "*", room_for=1)

    async def scene() -> None:
        for _ in range(3):
            assert (await ask(manager, "b")).tolist() == [[2.0, 2.0, 2.0]]
            assert "version 2 cannot be loaded" in manager.problems("b")[0]
            await ask(manager, "a")
        states = {(row["version"], row["state"]) for row in manager.index() if row["name"] == "b"}
        assert states == {("2", "UNAVAILABLE")}
        failures = [model["load_failures"] for model in manager.stats.snapshot()["models"] if model["version"] == 2]
        assert failures == [1], "it is not tried again by each request"
        await manager.refresh()
        publish(file_store, "b", commit_bundle(file_store, linear(7.0)))
        await manager.refresh()
        assert (await ask(manager, "b")).tolist() == [[7.0, 7.0, 7.0]]
        assert manager.problems("b") == []

    play(manager, scene)


def test_every_request_to_a_cold_model_that_cannot_be_loaded_gets_the_reason(file_store: ObstoreStore) -> None:
    bundle = commit_bundle(file_store)
    break_bundle(file_store, bundle)
    publish(file_store, "a", bundle)
    manager = manager_of(file_store, "*")

    async def scene() -> None:
        answers = await asyncio.gather(*(ask(manager, "a") for _ in range(5)), return_exceptions=True)
        assert {type(answer).__name__ for answer in answers} == {"ObjectCorrupt"}
        with pytest.raises(MaasError, match="sha256"):
            await ask(manager, "a")
        assert manager.index() == [
            {"name": "a", "version": "1", "state": "UNAVAILABLE", "reason": manager.index()[0]["reason"]}
        ]
        assert manager.index(ready_only=True) == []

    play(manager, scene)


def test_versions_in_the_url_of_cold_models(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    second = publish(file_store, "a", commit_bundle(file_store, linear(3.0)))
    Registry(file_store).promote("a", 1, "stable")
    models = [{"name": "a*"}, {"name": "a", "alias": "stable"}]
    manager = manager_of(file_store, models=models, room_for=1)

    async def scene() -> None:
        assert manager.versions("a") == [1, second]
        assert manager.find("a", 1) is not None, "the listed one was loaded at start"
        assert (await loaded(manager, "a", 2)).version.version == 2
        assert manager.find("a", 1) is None
        assert (await loaded(manager, "a")).version.version == 1, "the spec's own reference is the default"
        with pytest.raises(NotFound, match="'a' version 3 is not found; this pool serves: 1, 2"):
            manager.find("a", 3)

    play(manager, scene)


# Patterns


def test_a_pattern_follows_the_registry(file_store: ObstoreStore) -> None:
    publish_many(file_store, "team-a-x", "team-b-x")
    Registry(file_store).publish("team-a-unpromoted", commit_bundle(file_store))
    manager = manager_of(file_store, "team-a-*")

    async def scene() -> None:
        assert manager.names == ["team-a-x"]
        with pytest.raises(NotFound, match="this pool serves: team-a-x"):
            manager.find("team-b-x")
        publish_many(file_store, "team-a-y", "team-b-y")
        await manager.refresh()
        assert manager.names == ["team-a-x", "team-a-y"]
        assert (await ask(manager, "team-a-y")).tolist() == [[2.0, 2.0, 2.0]]
        assert {row["name"]: row["state"] for row in manager.index()} == {"team-a-x": "READY", "team-a-y": "READY"}

    play(manager, scene)


def test_a_pinned_pattern_is_loaded_as_models_appear(file_store: ObstoreStore) -> None:
    publish_many(file_store, "a")
    manager = manager_of(file_store, models=[{"name": "*", "pinned": True}])

    async def scene() -> None:
        assert in_memory(manager) == ["a"]
        publish_many(file_store, "b")
        await manager.refresh()
        assert in_memory(manager) == ["a", "b"]

    play(manager, scene)


def test_a_broken_model_that_a_pattern_matches_does_not_stop_a_replica_from_starting(file_store: ObstoreStore) -> None:
    publish_many(file_store, "good")
    bundle = commit_bundle(file_store, linear(9.0))
    break_bundle(file_store, bundle)
    publish(file_store, "bad", bundle)
    play(manager_of(file_store, models=[{"name": "*", "pinned": True}]), lambda: asyncio.sleep(0))
    with pytest.raises(MaasError, match="sha256"):
        play(manager_of(file_store, "bad"), lambda: asyncio.sleep(0))
