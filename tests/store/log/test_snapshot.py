"""Snapshots of logs: the same records with fewer requests; a damaged snapshot costs time but no data."""

import logging
import threading
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise

import pytest

from benchmarks.store.filling import memory_store
from benchmarks.store.slow import SlowStore
from maas_ray.errors import ObjectCorrupt
from maas_ray.store import sequence
from maas_ray.store.fsck import fsck
from maas_ray.store.log.compact import compact
from maas_ray.store.log.record import record_key
from maas_ray.store.log.snapshot import MAX_SPAN, UNIT, chain, decode, encode, end_of, first_of, snapshot_key
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.store.sealed import seal, unseal
from maas_ray.store.sequence import Follower, Record, Sequence
from tests.support.faulty import Died, DyingStore, WrappedStore

LOG = "log/log"


def fill(store: ObstoreStore, number: int, prefix: str = "log") -> list[Record]:
    """Appends records as several writers would, so that most snapshots are made of others; returns all of them."""
    log = Follower(Sequence(store, prefix))
    start = len(list(Sequence(store, prefix).read()))
    for count in range(start, number):
        log.append(lambda _, count=count: {"number": count})  # type: ignore[misc]
    return list(Sequence(store, prefix).read())


def snapshots(store: ObstoreStore, log: str = LOG) -> list[int]:
    return sorted(end for info in store.scan(log) if (end := end_of(info.key, log)) is not None)


@pytest.mark.parametrize("last", [8, 16, 120, 128, 136, 2048, 2056, 2176, 11_000, 32_768, 32_776, 100_000, 1_000_000])
def test_a_chain_holds_every_record_once(last: int) -> None:
    ends = list(chain(last))
    assert ends[0] == last
    assert first_of(ends[-1]) == 1
    assert all(first_of(newer) == older + 1 for newer, older in pairwise(ends))
    assert all(end - first_of(end) < MAX_SPAN for end in ends)
    assert len(ends) <= 3 + last // MAX_SPAN


def test_a_log_is_the_same_with_and_without_snapshots(store: ObstoreStore) -> None:
    records = fill(store, 21)
    assert snapshots(store) == [8, 16]
    store.delete([snapshot_key(LOG, end) for end in (8, 16)])
    assert list(Sequence(store, "log").read()) == records
    assert [record.event["number"] for record in records] == list(range(21))


@pytest.mark.parametrize("number", [1, 7, 8, 9, 127, 128, 135, 300, 2050, 2300])
def test_a_long_log_is_read_with_few_requests(number: int) -> None:
    store = memory_store()
    records = fill(store, number)
    counting = SlowStore(store)
    assert list(Sequence(counting, "log").read()) == records
    counts = counting.taken()
    assert (counts.puts, counts.deletes) == (0, 0)
    assert counts.lists <= 2
    assert counts.gets <= 2 * len(list(chain(number // UNIT * UNIT))) + number % UNIT


def test_a_poll_costs_two_requests_without_changes_and_finds_new_records(store: ObstoreStore) -> None:
    fill(store, 11)
    counting = SlowStore(store)
    follower = Follower(Sequence(counting, "log"))
    assert len(follower.look()) == 11
    counting.taken()
    assert follower.look() == []
    counts = counting.taken()
    assert (counts.gets, counts.lists) == (2, 0)
    fill(store, 60)
    assert [record.seq for record in follower.look()] == list(range(12, 61))


def test_a_store_that_was_taken_away_does_not_look_like_one_without_news(file_store: ObstoreStore) -> None:
    fill(file_store, 3)
    follower = Follower(Sequence(file_store, "log"))
    follower.look()
    file_store.delete([info.key for info in file_store.scan(LOG)])
    with pytest.raises(Exception, match="no record 2|no longer exists"):
        follower.look()


def _without(lines: list[bytes], index: int) -> list[bytes]:
    return lines[:index] + lines[index + 1 :]


def _made(lines: list[bytes], end: int, **changes: object) -> bytes:
    """A snapshot with a header that fits its lines, as somebody who can seal would write it."""
    bodies = [unseal("", line) for line in lines]
    data = encode(LOG, first_of(end), end, bodies[0]["previous"], bodies[-1]["digest"], lines)
    head, _, rest = data.partition(b"\n")
    header = {name: value for name, value in unseal("", head).items() if name != "digest"}
    return seal({**header, **changes}) + b"\n" + rest


def _forged(lines: list[bytes], end: int) -> bytes:
    """All records again, each with another event, and with new links."""
    previous, made = "", []
    for line in lines:
        body = {name: value for name, value in unseal("", line).items() if name != "digest"}
        made.append(seal({**body, "event": {"number": -1}, "previous": previous}))
        previous = unseal("", made[-1])["digest"]
    return _made(made, end)


def _nested(lines: list[bytes]) -> bytes:
    body = b'{"deep":' + b"[" * 5000 + b"]" * 5000 + b"}"
    line = b'{"digest":"' + sha256(body).hexdigest().encode() + b'",' + body[1:]
    rest = b"".join(each + b"\n" for each in [*lines[:-1], line])
    header = {name: value for name, value in unseal("", _made(lines, 16).split(b"\n")[0]).items() if name != "digest"}
    return seal({**header, "sha256": sha256(rest).hexdigest()}) + b"\n" + rest


DAMAGE: dict[str, Callable[[bytes, list[bytes], ObstoreStore], bytes]] = {
    "empty": lambda data, lines, store: b"",
    "cut": lambda data, lines, store: data[:-30],
    "a byte": lambda data, lines, store: data.replace(b'"number":5', b'"number":6'),
    "a header of another digest": lambda data, lines, store: data.replace(b'"first":1', b'"first":2'),
    "without its first record": lambda data, lines, store: _made(_without(lines, 0), 16),
    "without one in the middle": lambda data, lines, store: _made(_without(lines, 6), 16),
    "without its last record": lambda data, lines, store: _made(_without(lines, 15), 16),
    "without its last record, with a matching header": lambda data, lines, store: _made(
        _without(lines, 15), 16, last=15
    ),
    "two records swapped": lambda data, lines, store: _made([lines[1], lines[0], *lines[2:]], 16),
    "one record twice": lambda data, lines, store: _made([*lines[:6], lines[5], *lines[7:]], 16),
    "rolled back to the one before": lambda data, lines, store: store.get(snapshot_key(LOG, 8)),
    "of another log": lambda data, lines, store: store.get(snapshot_key("other/log", 16)),
    "other records, linked and sealed": lambda data, lines, store: _forged(lines, 16),
    "of a later format": lambda data, lines, store: _made(lines, 16, format=2),
    "nested deep": lambda data, lines, store: _nested(lines),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("number", [16, 21])
def test_a_damaged_snapshot_is_never_used_and_is_named(
    file_store: ObstoreStore, caplog: pytest.LogCaptureFixture, damage: str, number: int
) -> None:
    fill(file_store, 16, "other")
    records = fill(file_store, number)
    key = snapshot_key(LOG, 16)
    data = file_store.get(key)
    file_store.put(key, DAMAGE[damage](data, decode(LOG, 16, data)[1], file_store))
    with caplog.at_level(logging.WARNING, logger="maas_ray"):
        for _ in range(3):
            assert list(Sequence(file_store, "log").read()) == records
    assert len([entry for entry in caplog.records if key in entry.getMessage()]) <= 1, "it is said once"
    assert len([problem for problem in fsck(file_store).problems if key in problem]) == 1
    assert compact(file_store, "log").written == (key,), "it is made again"
    assert fsck(file_store).problems == []
    assert file_store.get(key) == data
    assert compact(file_store, "log").written == ()


def test_a_damaged_record_is_found_below_a_snapshot(file_store: ObstoreStore) -> None:
    fill(file_store, 16)
    key = record_key(LOG, 5)
    file_store.put(key, file_store.get(key).replace(b'"number":4', b'"number":9'))
    assert [key in problem for problem in fsck(file_store).problems] == [True]


def test_the_record_at_the_end_of_a_snapshot_is_compared_with_it(file_store: ObstoreStore) -> None:
    """Who replaces one object changes nothing; who replaces both, as before snapshots, breaks the chain after it."""
    fill(file_store, 18)
    data = file_store.get(snapshot_key(LOG, 16))
    forged = _forged(decode(LOG, 16, data)[1], 16)
    file_store.put(snapshot_key(LOG, 16), forged)
    file_store.put(record_key(LOG, 16), forged.splitlines()[-1])
    with pytest.raises(ObjectCorrupt, match="does not follow"):
        list(Sequence(file_store, "log").read())


@pytest.mark.parametrize("after", [False, True])
def test_a_writer_that_dies_before_its_snapshot_leaves_it_to_the_next_one(
    file_store: ObstoreStore, after: bool
) -> None:
    fill(file_store, 7)
    with pytest.raises(Died):
        fill(DyingStore(file_store, dies_at=1 if after else 2, after=after), 8)  # type: ignore[arg-type]
    assert snapshots(file_store) == []
    assert len(list(Sequence(file_store, "log").read())) == 8
    fill(file_store, 9)
    assert snapshots(file_store) == [8]
    assert fsck(file_store).problems == []


def test_a_snapshot_that_cannot_be_written_keeps_no_record_from_being_appended(file_store: ObstoreStore) -> None:
    class Refuses(WrappedStore):
        def create(self, key: str, data: bytes) -> None:
            if key.endswith(".jsonl"):
                raise sequence.StoreUnavailable("no snapshots today")
            super().create(key, data)

    refuses = Refuses(file_store)
    assert len(fill(refuses, 20)) == 20
    assert snapshots(file_store) == []
    fill(file_store, 21)
    assert snapshots(file_store) == [16], "the next writer writes the missing snapshot"


def test_many_writers_at_once_write_the_same_snapshots(storage: StorageSpec) -> None:
    num_writers, num_each = 4, 8
    failures: list[BaseException] = []

    def write() -> None:
        try:
            log = Sequence(open_store(storage), "log")
            for _ in range(num_each):
                log.append(lambda records: {"number": len(records)})
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(num_writers)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=240)
    assert failures == []
    store = open_store(storage)
    assert [record.event["number"] for record in Sequence(store, "log").read()] == list(range(32))
    assert snapshots(store)[-1] == 32
    assert fsck(store).problems == []


def test_events_that_depend_on_nothing_are_appended_without_reading_the_log() -> None:
    store = memory_store()
    fill(store, 300)
    counting = SlowStore(store)
    Sequence(counting, "log").note({"number": 300})
    counts = counting.taken()
    assert (counts.gets, counts.lists, counts.puts) == (3, 2, 1)
    for number in range(301, 320):
        Sequence(store, "log").note({"number": number})
    assert [record.event["number"] for record in Sequence(store, "log").read()] == list(range(320))
    assert snapshots(store)[-1] == 320


def test_a_foreign_name_in_the_log_is_ignored(file_store: ObstoreStore) -> None:
    records = fill(file_store, 9)
    for name in ("-foo.jsonl", "-1.jsonl", ".DS_Store", f"-{0:020d}.jsonl.part"):
        file_store.put(f"{LOG}/{name}", b"not ours")
    assert list(Sequence(file_store, "log").read()) == records
    report = fsck(file_store)
    assert (report.problems, len(report.foreign)) == ([], 4)
