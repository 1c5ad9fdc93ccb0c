"""kill -9 at every single call that changes a file, while a process saves, retains and collects garbage."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from maas_ray.checkpoint import parts, upload
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import StorageSpec, open_store
from tests.checkpoint.test_crash import ALLOWED, FEW, _act, _checked_view, _fresh
from tests.support.killed import CALLS
from tests.support.root import ROOT


def act(uri: str) -> None:
    """What the killed process does."""
    torch.set_num_threads(1)
    parts.PART_BYTES, upload.IN_FLIGHT = FEW, 1
    _act(open_store(uri))


@pytest.fixture(scope="module")
def killer() -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "tests.support.killed", "tests.faults.test_checkpoint_kill:act"]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=60)


@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_the_newest_committed_checkpoint_loads_whatever_call_a_process_is_killed_at(
    killer: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert killer.stdin is not None
    assert killer.stdout is not None
    _fresh(StorageSpec(uri=f"file://{tmp_path}/begin"), "")
    views = []
    for number in range(1, 1000):
        place = tmp_path / "now"
        shutil.copytree(tmp_path / "begin-", place)
        killer.stdin.write(f"{number} file://{place}\n")
        killer.stdin.flush()
        answer = killer.stdout.readline().strip()
        store = open_store(f"file://{place}")
        views.append(_checked_view(store))
        assert views[-1] in ALLOWED
        assert fsck(store, collect=True, grace=timedelta(0)).problems == []
        assert _checked_view(store) == views[-1]
        _act(store)
        assert _checked_view(store) == ALLOWED[-1]
        shutil.rmtree(place)
        if answer != "killed":
            break
    assert answer == "done 0", "the last one was not killed: all calls have been tried"
    assert len(views) > 50, f"calls of {CALLS} were counted"
    assert set(views) == set(ALLOWED)
    order = [ALLOWED.index(view) for view in views]
    assert order == sorted(order), "each later point sees as much or more"
