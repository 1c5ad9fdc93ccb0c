"""The list of runs: the same as the runs themselves, with a few requests whatever their number."""

from typing import Any

import pytest

from benchmarks.store.filling import memory_store, spec_of
from benchmarks.store.slow import SlowStore
from maas_ray.checkpoint.save import save
from maas_ray.cli.checks import all_checks
from maas_ray.errors import StoreDenied
from maas_ray.store.fsck import fsck
from maas_ray.store.manifest import POINTERS
from maas_ray.store.objects import ObjectStore, ObstoreStore
from maas_ray.store.sequence import Sequence
from maas_ray.train.records import run_index
from maas_ray.train.records.run_index import MAX_UNVALIDATED, RunIndex, Summary, point_at
from maas_ray.train.records.runs import Runs
from tests.checkpoint.states import snapshot
from tests.support.faulty import WrappedStore

SHOWN = ("id", "status", "step", "metrics", "created_s", "data_digest", "git_commit", "error", "reason", "unvalidated")
EVENTS: list[dict[str, Any]] = [
    {"type": "started", "workers": 2},
    {"type": "unvalidated", "step": 3, "error": "no room"},
    {"type": "unvalidated", "step": 7, "error": "no room"},
    {"type": "validated", "step": 7, "metrics": {"validation_loss": 0.5}},
    {"type": "attempt", "number": 1, "workers": 2, "first_step": None, "reached": 3, "committed": 7, "reason": "over"},
    {"type": "failed", "error": "store_unavailable: away"},
    {"type": "started", "workers": 2},
    {"type": "evaluated", "metrics": {"loss": 0.5}},
    {"type": "finished", "step": 9, "reason": "early"},
]


def create(store: ObstoreStore, run: str, now: float = 1.0) -> Runs:
    runs = Runs(store, clock=lambda: now)
    runs.create(spec_of(store, run), "d" * 64, "abc")
    return runs


def shown(run: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in SHOWN}


def listed(store: ObjectStore) -> dict[str, Summary]:
    return {run.id: run for run in Runs(store).all()}


def test_a_run_is_listed_as_it_is_after_every_event(store: ObstoreStore) -> None:
    runs = create(store, "r")
    for event in (None, *EVENTS):
        if event is not None:
            runs.record("r", event)
        assert shown(listed(store)["r"]) == shown(runs.get("r"))
    report = fsck(store)
    assert (report.problems, report.orphans, report.foreign) == ([], [], [])


def test_runs_are_listed_newest_first_with_few_requests() -> None:
    store = memory_store()
    for number in range(40):
        runs = create(store, f"r{number}", now=float(number))
        for event in EVENTS:
            runs.record(f"r{number}", event)
    counting = SlowStore(store)
    found, damaged = Runs(counting).survey()
    assert ([run.id for run in found], damaged) == ([f"r{number}" for number in reversed(range(40))], {})
    counts = counting.taken()
    assert counts.gets <= 15
    assert (counts.lists, counts.puts) == (4, 0)


def test_the_runs_of_a_store_without_an_index_are_read_once(store: ObstoreStore) -> None:
    for number in range(3):
        create(store, f"r{number}").record(f"r{number}", EVENTS[-1])
    before = {run: shown(each) for run, each in listed(store).items()}
    store.delete([info.key for info in store.scan("index")])
    assert {run: shown(each) for run, each in listed(store).items()} == before
    counting = SlowStore(store)
    assert {run: shown(each) for run, each in listed(counting).items()} == before
    assert counting.taken().gets <= 2


def test_a_store_that_cannot_be_written_lists_its_runs_all_the_same(file_store: ObstoreStore) -> None:
    class ReadOnly(WrappedStore):
        def create(self, key: str, data: bytes) -> None:
            raise StoreDenied("read only")

    create(file_store, "r")
    file_store.delete([info.key for info in file_store.scan("index")])
    assert list(listed(ReadOnly(file_store))) == ["r"]


def test_a_process_that_died_before_it_wrote_the_index_is_found_out(file_store: ObstoreStore) -> None:
    class NoIndex(WrappedStore):
        def create(self, key: str, data: bytes) -> None:
            if key.startswith("index/"):
                raise StoreDenied("killed")
            super().create(key, data)

    runs = create(file_store, "r")
    runs.record("r", EVENTS[0])
    dying = NoIndex(file_store)
    Runs(dying).record("r", EVENTS[-1])
    assert listed(file_store)["r"].status == "finished"
    for number in range(6):
        create(file_store, f"newer{number}", now=2.0)
    Runs(dying).record("newer0", EVENTS[-1])
    assert Runs(file_store).reindex() == 1
    assert listed(file_store)["newer0"].status == "finished"
    assert Runs(file_store).reindex() == 0


def test_the_newest_committed_step_of_every_unfinished_run_is_listed(store: ObstoreStore) -> None:
    for number in range(7):
        runs = create(store, f"r{number}", now=float(number))
        runs.record(f"r{number}", EVENTS[0])
        for step in (10, 20 + number):
            point_at(store, save(store, f"runs/r{number}/checkpoints", snapshot(step)).prefix)
    assert {run: each.step for run, each in listed(store).items()} == {f"r{n}": 20 + n for n in range(7)}
    assert len(list(store.scan(POINTERS))) == 7, "one for each run"
    assert fsck(store).foreign == fsck(store).orphans == []
    for number in range(7):
        runs.record(f"r{number}", {"type": "stopped"})
    assert list(store.scan(POINTERS)) == []
    assert {run: each.step for run, each in listed(store).items()} == {f"r{n}": 20 + n for n in range(7)}


def test_a_pointer_to_a_checkpoint_that_is_gone_is_an_orphan(file_store: ObstoreStore) -> None:
    point_at(file_store, "runs/r/checkpoints/0000000007")
    assert fsck(file_store).orphans == [f"{POINTERS}/runs/r/checkpoints/0000000007"]


def test_a_run_that_was_removed_is_not_listed(file_store: ObstoreStore) -> None:
    create(file_store, "r")
    create(file_store, "gone")
    file_store.delete([info.key for info in file_store.scan("runs/gone")])
    assert list(listed(file_store)) == ["r"]


@pytest.mark.parametrize("runs", [7, [{"id": 5}], [{"id": "r"}], [{"id": "r", "records": "x"}]])
def test_a_damaged_index_is_reported_not_used_and_made_again(file_store: ObstoreStore, runs: Any) -> None:
    create(file_store, "r").record("r", EVENTS[-1])
    Sequence(file_store, run_index.PREFIX).append(lambda _: {"type": "runs", "runs": runs})
    for _ in range(2):
        assert [run.status for run in listed(file_store).values()] == ["finished"]
    problems = fsck(file_store, checks=all_checks()).problems
    assert [f"{run_index.PREFIX}/log/{3:020d}.json" in problem for problem in problems] == [True]
    assert Runs(file_store).reindex() == 1
    assert fsck(file_store, checks=all_checks()).problems == []
    assert list(RunIndex(file_store).read()) == ["r"]


def test_a_later_version_may_write_other_events(file_store: ObstoreStore) -> None:
    create(file_store, "r")
    Sequence(file_store, run_index.PREFIX).append(lambda _: {"type": "later"})
    assert list(RunIndex(file_store).read()) == ["r"]


def test_only_the_newest_missing_figures_are_kept_of_a_run(file_store: ObstoreStore) -> None:
    runs = create(file_store, "r")
    for step in range(1, 31):
        runs.record("r", {"type": "unvalidated", "step": step, "error": "no room"})
    found = listed(file_store)["r"]
    assert sorted(found.unvalidated) == list(range(11, 31))
    assert len(found.unvalidated) == MAX_UNVALIDATED
    assert len(runs.get("r").unvalidated) == 30


def test_an_error_of_the_index_fails_no_run(file_store: ObstoreStore) -> None:
    runs = create(file_store, "r")
    file_store.put(f"{run_index.PREFIX}/log/{1:020d}.json", b"{}")
    runs.record("r", EVENTS[-1])
    assert runs.get("r").status == "finished"
    assert listed(file_store)["r"].status == "finished"
