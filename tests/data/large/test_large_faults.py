"""Killed tasks change nothing, and memory stays constant while half a gigabyte is prepared and read at random."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training.scale import job_fields, write_files
from maas_ray.data.large import gather, survey, units
from maas_ray.data.large import prepare as large
from maas_ray.data.large.gather import gather_unit
from maas_ray.data.large.write import Writing, write_unit
from maas_ray.data.prepare import prepare
from maas_ray.data.spec.data import DataSpec
from maas_ray.spec import parse_spec
from maas_ray.store.manifest import verify
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from tests.data.large.test_large import _digests, _here, _spec, _table, _write_files

pytestmark = [
    pytest.mark.fault,
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data 2.60 warns of a default of its own context.
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle. is deprecated:DeprecationWarning"),
]


def _die_once(mark: str, number: int) -> None:
    """Ends this process as the system ends one that takes too much memory, once for each piece of work."""
    try:
        os.close(os.open(f"{mark}-{number}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), 9)


def _gather_and_die(number: int, job: Any) -> dict[str, Any]:
    found = gather_unit(number, job)
    if number % 3 == 1:
        _die_once(f"{job.source.spec.uri}/_gathered", number)
    return found


def _write_and_die(number: int, writing: Writing, storage: StorageSpec) -> list[dict[str, Any]]:
    written = write_unit(number, writing, storage)
    if number % 3 == 0:
        _die_once(f"{writing.job.source.spec.uri}/_written", number)
    return written


def test_tasks_that_are_killed_and_run_again_leave_the_same_data_set(
    store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(_write_files(tmp_path / "files", _table(2000), 8))
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    monkeypatch.setattr(gather, "gather_unit", _gather_and_die)
    monkeypatch.setattr(large, "write_unit", _write_and_die)
    dataset = prepare(spec, store)
    marks = {path.name for path in (tmp_path / "files").iterdir() if path.name.startswith("_")}
    assert {"_gathered-1", "_written-0", "_written-3"} <= marks
    assert verify(dataset.committed) == []
    monkeypatch.undo()
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    for module in (large, survey, gather):
        monkeypatch.setattr(module, "run_tasks", _here)
    alone = prepare(spec, open_store(f"file://{tmp_path}/alone"))
    assert (dataset.digest, _digests(dataset)) == (alone.digest, _digests(alone))


_READ = """
import json, sys
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.data.loading import mapped_rows
from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.open import open_rows
from maas_ray.store.objects import open_store

if sys.argv[3] == "never":
    mapped_rows.MAX_MAPPED_BYTES = 1 << 60

def size():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

loader = Loader.over(open_rows(open_dataset(open_store(sys.argv[1]), sys.argv[2]), "train"), seed=0, global_batch=256, rank=0, world=1)
found = [size()]
for step in range(1500):
    loader.load(step * 256, 1 << 60)
    if step % 50 == 49:
        found.append(size())
print(json.dumps(found))
"""


def test_half_a_gigabyte_is_prepared_and_read_with_little_memory(file_store: ObstoreStore, tmp_path: Path) -> None:
    num_bytes = write_files(tmp_path / "files", 0.5)
    assert num_bytes > 450e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    dataset = prepare(parse_spec(DataSpec, job_fields(tmp_path / "files", 1)["data"]), file_store)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < 150e6  # the driver sees no row
    assert dataset.shards is not None

    def read(when: str) -> list[int]:
        argv = [sys.executable, "-c", _READ, file_store.uri, dataset.digest, when]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        sizes: list[int] = json.loads(done.stdout)
        return sizes

    sizes = read("often")
    assert max(sizes) - sizes[0] < 250e6
    grown = read("never")
    assert max(grown) - grown[0] > 350e6  # what the figure above would be if nothing gave pages back
