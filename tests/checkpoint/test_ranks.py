"""A failure on one rank fails the save on all ranks within a time limit, names the rank, and commits nothing."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint
from maas_ray.checkpoint.collectives import saving_group
from maas_ray.checkpoint.load import read_tensors
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import MaasError
from maas_ray.store.objects import open_store
from tests.checkpoint.states import is_equal
from tests.support.faulty import FaultyStore
from tests.support.ranks import run_ranks

TIMEOUT_S = 1.0
BOUND_S = 10.0


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"model.weight": torch.randn(256, 256), "model.bias": torch.randn(256)}


def _attempt(rank: int, results: dict[str, str], name: str, act: Any) -> None:
    begin = time.monotonic()
    try:
        act()
        results[name] = "saved"
    except MaasError as error:
        results[name] = f"{error.code}, retryable {error.retryable}: {error}"
    results[name] += "" if time.monotonic() - begin < BOUND_S else " BUT TOO LATE"


class _Hanging(FaultyStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        time.sleep(TIMEOUT_S * 2)


def _faults(rank: int, root: str) -> dict[str, str]:
    store = open_store(root)
    group = saving_group(20)
    results: dict[str, str] = {}
    state = Snapshot(1, 8, _tensors())
    for name, fault, where in (
        ("upload", "503", "/00001-"),
        ("manifest", "no space", "manifest.json"),
        ("history", "I/O error", "history.json"),
    ):
        faulty = FaultyStore(store, fault, 1, where=where)
        _attempt(rank, results, name, lambda faulty=faulty, name=name: save(faulty, name, state, group))
    for name, mine in (
        ("type", {"model.weight": torch.zeros(2, dtype=torch.complex128)}),
        ("shape", {**_tensors(), "model.bias": torch.zeros(255)}),
    ):
        chosen = Snapshot(1, 8, mine if rank == 1 else _tensors())
        _attempt(rank, results, name, lambda chosen=chosen, name=name: save(store, name, chosen, group))
    other_step = Snapshot(1 + rank, 8, _tensors())
    _attempt(rank, results, "step", lambda: save(store, "step", other_step, group))
    _attempt(rank, results, "afterwards", lambda: save(store, "afterwards", state, group))

    checkpointer = AsyncCheckpointer(FaultyStore(store, "503", 1, where="/00001-"), "checkpointer", group=group)
    checkpointer.save(state)
    checkpointer.save(Snapshot(2, 16, _tensors()))
    results["checkpointer"] = f"{checkpointer.failure}"[:60]
    results["checkpointer, next"] = str(checkpointer.wait())
    checkpointer.close()

    hung = saving_group(TIMEOUT_S)
    slow = _Hanging(store, "503") if rank == 1 else store
    _attempt(rank, results, "hang", lambda: save(slow, "hang", state, hung, TIMEOUT_S))
    _attempt(rank, results, "hang, next", lambda: save(store, "hang next", state, hung, TIMEOUT_S))

    late = saving_group(TIMEOUT_S)
    if rank == 1:  # hangs instead of saving, and continues after all others have given up
        time.sleep(TIMEOUT_S * 4)
    _attempt(rank, results, "late", lambda: save(store, "late", state, late))
    _attempt(rank, results, "late, next", lambda: save(store, "late", state, late))

    gone = saving_group(20)
    if rank == 0:  # the other one ends: its connections close
        _attempt(rank, results, "gone", lambda: save(store, "gone", state, gone))
    return results


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """One start of two processes for all tests below."""
    directory = tmp_path_factory.mktemp("store")
    return directory, run_ranks(_faults, 2, str(directory))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("upload", ["save_failed, retryable True", "rank 1: ", "/00001-00000.safetensors", "503"]),
        ("manifest", ["save_failed, retryable True", "rank 0 does not know", "upload/0000000001", "no space is left"]),
        ("history", ["save_failed, retryable True", "rank 0, ", "history.json", "Input/output error"]),
        ("type", ["save_failed, retryable True", "rank 1: tensor 'model.weight' has type torch.complex128"]),
        ("shape", ["save_failed, retryable True", "the ranks disagree on model.bias"]),
        ("hang", ["save_failed, retryable True", "rank 1: ", "00001-00000.safetensors was not written within 1 s"]),
        ("step", ["save_failed, retryable True", "different steps (1, 2)"]),
    ],
)
def test_a_failure_of_one_rank_is_that_of_all_and_names_rank_and_object(
    ran: tuple[Path, list[dict[str, str]]], name: str, words: list[str]
) -> None:
    directory, results = ran
    store = open_store(str(directory))
    assert results[0][name] == results[1][name], "the same words on every rank"
    for word in words:
        assert word.replace("upload/", f"{name}/") in results[0][name]
    assert "TOO LATE" not in results[0][name]
    assert list_checkpoints(store, name) == []
    left = [info.key for info in store.scan(name)]
    # Only where the manifest may still arrive must its parts stay.
    assert bool(left) == (name == "manifest"), left


def test_the_next_save_works(ran: tuple[Path, list[dict[str, str]]]) -> None:
    directory, results = ran
    for name in ("afterwards", "hang, next"):
        assert [found[name] for found in results] == ["saved", "saved"]
    assert is_equal(read_tensors(open_checkpoint(open_store(str(directory)), "afterwards"), ""), _tensors())


def test_a_saver_continues_after_a_failure_of_one_rank(ran: tuple[Path, list[dict[str, str]]]) -> None:
    directory, results = ran
    for found in results:
        assert found["checkpointer"].startswith("the checkpoint was aborted, nothing is committed: rank 1")
        assert found["checkpointer, next"] == "2"
    assert list_checkpoints(open_store(str(directory)), "checkpointer") == [2]


@pytest.mark.parametrize("name", ["late", "late, next", "gone"])
def test_the_wait_for_a_missing_or_lost_rank_is_bounded(ran: tuple[Path, list[dict[str, str]]], name: str) -> None:
    directory, results = ran
    for found in results if name != "gone" else results[:1]:
        assert "lost another rank while saving" in found[name]
        assert "TOO LATE" not in found[name]
    assert list_checkpoints(open_store(str(directory)), name.split(",")[0]) == []
