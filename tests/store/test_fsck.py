from datetime import UTC, datetime, timedelta

import pytest

from maas_ray.store.fsck import GRACE, fsck
from maas_ray.store.manifest import CommitWriter, open_committed
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Sequence

NOW = timedelta(0)


@pytest.fixture
def filled(store: ObstoreStore) -> ObstoreStore:
    writer = CommitWriter(store, "things/a", "thing")
    writer.put("one", b"first part")
    writer.commit({})
    log = Sequence(store, "registry")
    log.append(lambda _: {"n": 1})
    log.append(lambda _: {"n": 2})
    return store


def test_a_sound_store_is_clean(filled: ObstoreStore) -> None:
    report = fsck(filled, collect=True, grace=NOW)
    assert (report.num_objects, report.num_commits, report.num_records) == (4, 1, 2)
    assert report.problems == report.orphans == report.collected == report.foreign == []


def test_orphans_are_collected_only_after_their_grace(filled: ObstoreStore) -> None:
    part = CommitWriter(filled, "things/b", "thing").put("one", b"lost")
    assert fsck(filled, collect=True).orphans == [part.key]
    assert fsck(filled, grace=NOW).orphans == [part.key], "without collect nothing is removed"
    later = fsck(filled, collect=True, now=datetime.now(UTC) + GRACE + timedelta(minutes=1))
    assert later.collected == [part.key]
    assert fsck(filled).orphans == []


def test_an_interrupted_local_write_is_found_and_collected(file_store: ObstoreStore) -> None:
    file_store.create("a/b", b"x")
    assert file_store.root is not None
    (file_store.root / "a" / "c#1").write_bytes(b"half")
    assert fsck(file_store).orphans == ["a/c#1"]
    assert fsck(file_store, collect=True, grace=NOW).collected == ["a/c#1"]
    assert fsck(file_store).orphans == []


def test_files_of_other_programs_are_reported_and_never_touched(filled: ObstoreStore) -> None:
    filled.put("notes.txt", b"mine")
    report = fsck(filled, collect=True, grace=NOW)
    assert report.foreign == ["notes.txt"]
    assert filled.get("notes.txt") == b"mine"


def test_damage_is_named_and_its_neighbours_are_kept(filled: ObstoreStore) -> None:
    key = open_committed(filled, "things/a", "thing").parts["one"].key
    filled.put(key, b"first pert")
    filled.put("things/a/manifest.json", filled.get("things/a/manifest.json")[:-3])
    filled.put(f"registry/log/{1:020d}.json", b"{}")
    report = fsck(filled, collect=True, grace=NOW)
    assert len(report.problems) == 2
    assert any("things/a/manifest.json" in problem for problem in report.problems)
    assert any("registry/log" in problem for problem in report.problems)
    assert filled.get(key) == b"first pert", "parts under a damaged manifest may still be of use"


def test_a_damaged_part_is_a_problem(filled: ObstoreStore) -> None:
    key = open_committed(filled, "things/a", "thing").parts["one"].key
    filled.put(key, b"first pert")
    assert [key in problem for problem in fsck(filled).problems] == [True]
