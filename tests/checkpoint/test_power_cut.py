"""A committed checkpoint is on the disk, even if the power fails at any moment of saving and retention."""

import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore

from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, verify
from maas_ray.checkpoint.load import read_tensors
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import save
from maas_ray.errors import MaasError
from maas_ray.store import directory
from maas_ray.store.directory import Directory
from maas_ray.store.objects import ObstoreStore, open_store
from tests.checkpoint.states import PREFIX, is_equal, small_parts
from tests.checkpoint.test_crash import FEW, small_tensors, snapshot
from tests.support.power_cut import PowerCut


class Lost(AssertionError):
    """After the power cut something is missing or torn that a reader was promised."""


def _check(found: ObstoreStore, promised: list[int]) -> tuple[int, ...]:
    """The committed steps; each is whole, and the newest that `save` promised is among them."""
    steps = list_checkpoints(found, PREFIX)
    if promised and promised[-1] not in steps:
        raise Lost(f"step {promised[-1]} was committed, there is {steps}")
    for step in steps:
        try:
            committed = open_checkpoint(found, PREFIX, step)
            problems = verify(committed)
            is_whole = not problems and is_equal(read_tensors(committed, ""), small_tensors(step))
        except MaasError as error:
            raise Lost(str(error)) from error
        if not is_whole:
            raise Lost(f"step {step}: {problems}")
    return tuple(steps)


def _cut_at_every_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int) -> set[tuple[int, ...]]:
    """Saves three steps and retains two, with the power going before every sync and at the end.

    Returns:
        What readers find in the end, over all copies.

    Raises:
        Lost: a copy breaks a promise.
    """
    small_parts(monkeypatch, FEW)
    disk = tmp_path / "disk"
    disk.mkdir()
    draw = random.Random(0)
    promised: list[int] = []
    views: set[tuple[int, ...]] = set()
    lost: list[Lost] = []

    def cut(copies: int = copies) -> None:
        for number in range(0 if lost else copies):
            target = tmp_path / "found"
            power.copy(target, draw if number else None)
            try:
                views.add(_check(open_store(str(target / "new" / "store")), promised))
            except Lost as error:  # raised at the end: here it would be taken for a failure of the store
                lost.append(error)
            shutil.rmtree(target)

    power = PowerCut(disk, cut)
    power.watch(monkeypatch)
    store = open_store(str(disk / "new" / "store"))
    for step in (1, 2, 3):
        save(store, PREFIX, snapshot(step))
        promised.append(step)
    Retention(store, PREFIX, Keep(last=2)).apply()
    cut(20)
    if lost:
        raise lost[0]
    assert power.num_syncs > 30, "the disk was watched"
    return views


@pytest.mark.parametrize("copies", [2, pytest.param(40, marks=pytest.mark.fault)])
def test_a_committed_checkpoint_survives_a_power_cut_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    views = _cut_at_every_sync(tmp_path, monkeypatch, copies)
    assert {(), (1,), (1, 2), (1, 2, 3), (2, 3)} == views


def _obstore_and_then_sync(self: Directory, key: str, data: bytes | memoryview) -> None:
    """A name that is there before its bytes are safe, in directories of which one is synced."""
    obstore.put(LocalStore(self.root), key, bytes(data), mode="create" if "manifest" in key else "overwrite")
    for path in (self.root / key, (self.root / key).parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write_and_not_sync(self: Directory, path: Path, data: bytes | memoryview) -> None:
    with open(self._open(path), "wb") as file:
        file.write(data)


def _delete_and_not_sync(self: Directory, keys: Iterable[str]) -> None:
    for key in keys:
        (self.root / key).unlink(missing_ok=True)


SKIPPED: dict[str, list[tuple[object, str, Any]]] = {
    "the bytes of files": [(Directory, "_write", _write_and_not_sync)],
    "all names": [(directory, "_sync", lambda path: None)],
    "the names of directories": [(directory, "_make", lambda path: path.mkdir(parents=True, exist_ok=True))],
    "a removal": [(Directory, "delete", _delete_and_not_sync)],
    "what obstore leaves out": [
        (Directory, "put", _obstore_and_then_sync),
        (Directory, "create", _obstore_and_then_sync),
    ],
}


@pytest.mark.parametrize("what", SKIPPED)
def test_a_skipped_sync_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The negative control."""
    for owner, name, faulty in SKIPPED[what]:
        monkeypatch.setattr(owner, name, faulty)
    with pytest.raises(Lost):
        _cut_at_every_sync(tmp_path, monkeypatch, 3)
