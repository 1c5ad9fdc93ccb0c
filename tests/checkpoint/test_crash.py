"""The newest committed checkpoint loads and verifies after any store failure at any point of saving."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from maas_ray.checkpoint import save as saving
from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, read_saved, verify
from maas_ray.checkpoint.load import load_into, read_tensors
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import MaasError, NotFound, SaveFailed, StoreUnavailable
from maas_ray.store.fsck import fsck
from maas_ray.store.manifest import CommitWriter
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from tests.checkpoint.states import PREFIX, is_equal, small_parts, zeros
from tests.support.faulty import FAULTS, Died, DyingStore, FaultyStore

FATES = ("dies before", "dies after", *FAULTS)
FEW = 300
"""Size of parts in bytes: two of them. 1: each tensor has its own."""
NUM_POINTS = {FEW: 54, 64: 126, 1: 222}
"""Points for each size of parts; over the two stores of the long test 582."""
ALLOWED = ((1, 2), (1, 2, 3), (2, 3))
"""What a reader may see, in this order: retention removes step 1 when step 3 is committed."""


def small_tensors(step: int) -> dict[str, Tensor]:
    """Small enough that a point takes little time."""
    return {f"t{number}": torch.full((8,), float(step * 10 + number)) for number in range(16)}


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, step * 8, small_tensors(step), {"seed": 5}, [{"step": 1}])


def _act(store: Any) -> None:
    """Saving, retention and garbage collection."""
    save(store, PREFIX, snapshot(3))
    Retention(store, PREFIX, Keep(last=2)).apply()
    fsck(store, collect=True, grace=timedelta(0))


@dataclass(frozen=True)
class Point:
    """One fate of one operation, and what it led to."""

    fate: str
    number: int
    view: tuple[int, ...]


def _checked_view(store: ObstoreStore) -> tuple[int, ...]:
    """The committed steps; every one loads, bit for bit, and verifies."""
    steps = list_checkpoints(store, PREFIX)
    for step in steps:
        committed = open_checkpoint(store, PREFIX, step)
        found = zeros(small_tensors(step))
        load_into(committed, found)
        assert is_equal(found, small_tensors(step))
        assert read_saved(committed).step == step
        assert verify(committed) == []
    return tuple(steps)


def _faulty(store: ObstoreStore, fate: str, number: int | None) -> Any:
    if fate in FAULTS:
        return FaultyStore(store, fate, number)
    return DyingStore(store, number, after=fate == "dies after")


def _fresh(storage: StorageSpec, name: str) -> ObstoreStore:
    store = open_store(storage.model_copy(update={"uri": f"{storage.uri}-{name}"}))
    for step in (1, 2):
        save(store, PREFIX, snapshot(step))
    CommitWriter(store, f"{PREFIX}/0000000009", "checkpoint").put("lost", b"of an attempt that ended")
    return store


def _points(storage: StorageSpec, every: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """Saves and retains in a new store for each operation and each fate of it."""
    small_parts(monkeypatch, size)
    counting = DyingStore(_fresh(storage, f"{size}-count"))
    _act(counting)
    for number in sorted({1, *range(counting.num_operations, 0, -every)}):
        for fate in FATES:
            store = _fresh(storage, f"{size}-{number}-{fate.replace(' ', '-').replace('/', '')}")
            # A fault may be survived, such as an answer that got lost; a death is not.
            with pytest.raises((Died, MaasError)) if fate not in FAULTS else suppress(MaasError):
                _act(_faulty(store, fate, number))
            view = _checked_view(store)
            assert view in ALLOWED
            cleaned = fsck(store, collect=True, grace=timedelta(0))
            assert cleaned.problems == []
            assert _checked_view(store) == view, "collecting orphans must not change what readers see"
            _act(store)  # the next process can complete the same work
            assert _checked_view(store) == ALLOWED[-1]
            assert fsck(store).problems == []
            yield Point(fate, number, view)


def test_the_newest_committed_checkpoint_loads_whatever_happens_to_any_operation(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = StorageSpec(uri=f"file://{tmp_path}/store")
    points = list(_points(storage, 2, FEW, monkeypatch))
    assert {point.view for point in points} == set(ALLOWED)
    for fate in ("dies before", "dies after"):
        order = [ALLOWED.index(point.view) for point in points if point.fate == fate]
        assert order == sorted(order), "each later point sees as much or more"


@pytest.mark.fault
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("storage", "size"), [("file", FEW), ("file", 64), ("file", 1), ("s3", FEW), ("s3", 64)], indirect=["storage"]
)
def test_the_newest_committed_checkpoint_loads_at_every_point(
    storage: StorageSpec, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = list(_points(storage, 1, size, monkeypatch))
    assert len(points) == NUM_POINTS[size]
    assert {point.view for point in points} == set(ALLOWED)


def test_a_manifest_that_is_written_before_its_parts_is_caught(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same check must fail for a commit in the wrong order."""
    held: list[tuple[Any, str, bytes]] = []

    class Later:
        def __init__(self, store: Any) -> None:
            self._store = store

        def put(self, key: str, data: Any) -> None:
            held.append((self._store, key, bytes(data)))

    def commit(store: Any, *arguments: Any) -> Any:
        mine = [(key, data) for its_store, key, data in held if its_store is store]
        held.clear()  # also what an attempt before this one died with
        outcome = real_commit(store, *arguments)
        for key, data in mine:
            store.put(key, data)
        return outcome

    real_upload, real_commit = saving.upload, saving.commit
    monkeypatch.setattr(saving, "upload", lambda store, *rest: real_upload(Later(store), *rest))
    monkeypatch.setattr(saving, "commit", commit)
    with pytest.raises(MaasError, match="is missing"):
        list(_points(StorageSpec(uri=f"file://{tmp_path}/store"), 1, FEW, monkeypatch))


class _Silent(FaultyStore):
    """The answer to the manifest gets lost, and the store is not reachable for some time after it."""

    def get(self, key: str) -> bytes:
        if key.endswith("manifest.json"):
            raise StoreUnavailable("not now")
        return super().get(key)


def test_the_parts_of_a_manifest_that_may_have_arrived_are_left(file_store: ObstoreStore) -> None:
    with pytest.raises(SaveFailed, match="does not know whether .* was committed, its parts are kept"):
        save(_Silent(file_store, "timeout after success", 1, where="manifest"), PREFIX, snapshot(3))
    committed = open_checkpoint(file_store, PREFIX)
    assert verify(committed) == []
    assert is_equal(read_tensors(committed, ""), small_tensors(3))


def test_an_answer_that_got_lost_is_found_out(file_store: ObstoreStore) -> None:
    save(FaultyStore(file_store, "timeout after success", 1, where="manifest"), PREFIX, snapshot(3))
    assert list_checkpoints(file_store, PREFIX) == [3]


def test_retention_that_fails_half_way_never_leaves_a_manifest_without_its_parts(file_store: ObstoreStore) -> None:
    for step in (1, 2):
        save(file_store, PREFIX, snapshot(step))
    faulty = FaultyStore(file_store, "503", 1, where="manifest.json")
    with pytest.raises(StoreUnavailable):
        Retention(faulty, PREFIX, Keep(last=1)).apply()
    assert _checked_view(file_store) == (1, 2)
    Retention(file_store, PREFIX, Keep(last=1)).apply()
    assert _checked_view(file_store) == (2,)
    with pytest.raises(NotFound):
        open_checkpoint(file_store, PREFIX, 1)
