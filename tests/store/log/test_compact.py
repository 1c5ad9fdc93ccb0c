"""Retention of logs: removed records are in two remaining objects, and concurrent access is not affected."""

from datetime import UTC, datetime, timedelta

import pytest

from benchmarks.store.filling import memory_store
from maas_ray.errors import ObjectCorrupt, SpecError
from maas_ray.store import sequence
from maas_ray.store.fsck import fsck
from maas_ray.store.log.compact import compact
from maas_ray.store.log.record import RECORD, record_key
from maas_ray.store.log.snapshot import snapshot_key
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Follower, Sequence
from tests.store.log.test_snapshot import LOG, fill, snapshots
from tests.support.faulty import WrappedStore

LATER = datetime.now(UTC) + timedelta(days=2)


def shrink(store: ObstoreStore) -> int:
    """Removes all that may go; returns how many objects that were."""
    return len(compact(store, "log", remove=True, now=LATER).removed)


def numbers(store: ObstoreStore) -> list[int]:
    return [int(match[2]) for info in store.scan(LOG) if (match := RECORD.fullmatch(info.key))]


def test_a_log_is_unchanged_by_retention_and_continues(store: ObstoreStore) -> None:
    records = fill(store, 45)
    assert shrink(store) > 20
    assert list(Sequence(store, "log").read()) == records
    assert list(Sequence(store, "log").read(after=3)) == records[3:]
    assert shrink(store) == 0, "there is nothing more to remove"
    assert fill(store, 60)[:45] == records
    assert [record.event["number"] for record in Sequence(store, "log").read()] == list(range(60))
    report = fsck(store)
    assert (report.problems, report.orphans, report.foreign, report.num_records) == ([], [], [], 60)


@pytest.mark.parametrize("number", [24, 136, 300, 2100])
def test_whatever_object_is_lost_after_retention_no_record_is(number: int) -> None:
    store = memory_store()
    records = fill(store, number)
    shrink(store)
    left = {info.key: store.get(info.key) for info in store.scan(LOG)}
    assert len(left) < 60
    tail = {record_key(LOG, seq) for seq in range(number // 8 * 8 + 1, number + 1)}
    for key in left.keys() - tail:
        for damage in (None, b"", left[key][:-9]):
            store.delete([key])
            if damage is not None:
                store.put(key, damage)
            if damage is None or key.endswith(".jsonl"):
                assert list(Sequence(store, "log").read()) == records, key
            assert damage is None or any(key in problem for problem in fsck(store).problems)
        store.put(key, left[key])


def test_young_records_and_records_stored_once_are_never_removed(file_store: ObstoreStore) -> None:
    fill(file_store, 32)
    assert compact(file_store, "log", remove=True).removed == (), "all of it is younger than a day"
    with pytest.raises(SpecError, match="at least an hour"):
        compact(file_store, "log", remove=True, grace=timedelta(minutes=59))
    file_store.delete([snapshot_key(LOG, end) for end in (8, 16, 24)] + [record_key(LOG, 3)])
    with pytest.raises(ObjectCorrupt, match="record 3 in only one snapshot"):
        shrink(file_store)
    assert len(numbers(file_store)) == 31


def test_a_store_without_snapshots_gets_them(store: ObstoreStore) -> None:
    records = fill(store, 20)
    store.delete([snapshot_key(LOG, end) for end in snapshots(store)])
    assert compact(store, "log").written == (snapshot_key(LOG, 16),)
    assert list(Sequence(store, "log").read()) == records


class Clock:
    """The time by both clocks of `sequence`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(sequence, "clocks", lambda: (self.now, self.now))


def test_a_follower_that_slept_while_records_went_misses_none(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    fill(file_store, 5)
    follower = Follower(Sequence(file_store, "log"))
    follower.look()
    fill(file_store, 40)
    shrink(file_store)
    assert 6 not in numbers(file_store)
    clock.now += 3 * 3600
    assert [record.seq for record in follower.look()] == list(range(6, 41))


def test_a_writer_that_slept_between_its_look_and_its_put_forks_nothing(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    fill(file_store, 5)
    slept = False

    def decide(new: list[sequence.Record]) -> dict[str, int]:
        nonlocal slept
        if not slept:
            slept = True
            fill(file_store, 40)
            shrink(file_store)
            assert 6 not in numbers(file_store), "its number is free again"
            clock.now += 3 * 3600
        return {"number": 40}

    record = Follower(Sequence(file_store, "log")).append(decide)
    assert record.seq == 41
    assert [each.event["number"] for each in Sequence(file_store, "log").read()] == list(range(41))
    assert 6 not in numbers(file_store)
    assert fsck(file_store).problems == []


def test_a_reader_whose_objects_are_removed_meanwhile_reads_again(file_store: ObstoreStore) -> None:
    records = fill(file_store, 20)

    class Shrinks(WrappedStore):
        """Retention runs after the first look at the log."""

        is_new = True

        def get(self, key: str) -> bytes:
            if self.is_new:
                self.is_new = False
                fill(file_store, 140)
                shrink(file_store)
                file_store.delete([record_key(LOG, seq) for seq in range(17, 21)])
            return super().get(key)

    shrinking = Shrinks(file_store)
    assert list(Sequence(shrinking, "log").read())[:20] == records
