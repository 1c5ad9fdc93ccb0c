"""A process that dies before or after any store operation leaves the old state or the new one, never a part."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from maas_ray.errors import MaasError
from maas_ray.registry.models import Registry
from maas_ray.store import manifest
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from tests.support.bundles import save_toy_bundle
from tests.support.faulty import FAULTS, Died, DyingStore, FaultyStore


def _publish(store: Any) -> None:
    registry = Registry(store)
    version = registry.publish("digits", save_toy_bundle(store, b"new graph"))
    registry.promote("digits", version.version)


def _published_before(store: ObstoreStore) -> None:
    registry = Registry(store)
    registry.publish("digits", save_toy_bundle(store, b"old graph"))
    registry.promote("digits", 1)


def _view_of_registry(store: ObstoreStore) -> tuple[tuple[int, ...], int]:
    registry = Registry(store)
    model = registry.model("digits")
    for version in model.versions.values():
        assert registry.info(version).signature.inputs
    return tuple(model.versions), model.aliases["production"]


@dataclass(frozen=True)
class Case:
    before: Callable[[ObstoreStore], None]
    act: Callable[[Any], None]
    view: Callable[[ObstoreStore], Any]
    allowed: tuple[Any, ...]
    """Views that a reader may have, in the order in which they may appear."""


CASES = {
    "publish and promote": Case(_published_before, _publish, _view_of_registry, (((1,), 1), ((1, 2), 1), ((1, 2), 2))),
}


def _num_operations(case: Case, storage: StorageSpec) -> int:
    store = open_store(storage.model_copy(update={"uri": f"{storage.uri}-count"}))
    case.before(store)
    counting = DyingStore(store)
    case.act(counting)
    return counting.num_operations


def _states_after_each_death(case: Case, storage: StorageSpec, every: int = 1) -> list[Any]:
    """The reader's view after a death at each point in turn, in a store of its own.

    Args:
        case: what is done.
        storage: where.
        every: 3 for every third point only, with the first and the last one.
    """
    views = []
    for point in sorted({1, *range(_num_operations(case, storage), 0, -every)}):
        for after in (False, True):
            store = open_store(storage.model_copy(update={"uri": f"{storage.uri}-{point}-{after}"}))
            case.before(store)
            with pytest.raises(Died):
                case.act(DyingStore(store, dies_at=point, after=after))
            views.append(case.view(store))
            cleaned = fsck(store, collect=True, grace=timedelta(0))
            assert cleaned.problems == []
            assert case.view(store) == views[-1], "collecting orphans must not change what readers see"
            again = fsck(store)
            assert (again.problems, again.orphans, again.foreign) == ([], [], [])
            case.act(store)  # the next process can complete the same work
            assert fsck(store).problems == []
    return views


@pytest.mark.parametrize(
    ("storage", "every"),
    [("file", 1), ("s3", 3), pytest.param("s3", 1, marks=pytest.mark.fault)],
    indirect=["storage"],
)
@pytest.mark.parametrize("name", CASES)
def test_readers_see_the_old_state_or_the_new_one_whatever_the_point_of_death(
    name: str, storage: StorageSpec, every: int
) -> None:
    case = CASES[name]
    views = _states_after_each_death(case, storage, every)
    assert views[0] == case.allowed[0]
    assert views[-1] == case.allowed[-1]
    order = [case.allowed.index(view) for view in views]
    assert order == sorted(order)
    assert set(order) == set(range(len(case.allowed)))


@pytest.mark.fault
@pytest.mark.parametrize("name", CASES)
def test_readers_see_the_old_state_or_the_new_one_whatever_the_store_reports(name: str, storage: StorageSpec) -> None:
    case = CASES[name]
    views = []
    for number in range(1, _num_operations(case, storage) + 1):
        for fault in FAULTS:
            place = f"{storage.uri}-{number}-{fault.replace(' ', '-').replace('/', '')}"
            store = open_store(storage.model_copy(update={"uri": place}))
            case.before(store)
            with suppress(MaasError):  # some are survived, such as an answer that got lost
                case.act(FaultyStore(store, fault, number))
            views.append(case.view(store))
            assert fsck(store, collect=True, grace=timedelta(0)).problems == []
            assert case.view(store) == views[-1]
            case.act(store)
            assert fsck(store).problems == []
    assert set(views) == set(case.allowed)


def test_a_commit_whose_manifest_is_written_first_is_caught(
    storage: StorageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the same check must fail for a commit in the wrong order."""

    class ManifestFirst(manifest.CommitWriter):
        def put(self, name: str, data: bytes) -> manifest.Part:
            key = f"{self._prefix}/parts-{self._attempt}/{name}"
            self._parts[name] = manifest.Part(key, len(data), manifest.sha256(data).hexdigest())
            self._held = [*getattr(self, "_held", []), (key, data)]
            return self._parts[name]

        def commit(self, meta: Any) -> manifest.Committed:
            committed = super().commit(meta)
            for key, data in self._held:
                self._store.put(key, data)
            return committed

    monkeypatch.setattr("maas_ray.bundle.format.CommitWriter", ManifestFirst)
    with pytest.raises((MaasError, AssertionError), match="is missing"):
        _states_after_each_death(CASES["publish and promote"], storage)
