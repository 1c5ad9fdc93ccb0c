import threading

import pytest

from maas_ray.errors import ObjectCorrupt, StoreUnavailable
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.store.sequence import MAX_ATTEMPTS, Sequence
from tests.support.faulty import WrappedStore


def test_records_are_read_in_order_and_after_a_number(store: ObstoreStore) -> None:
    log = Sequence(store, "log", clock=lambda: 12.5)
    for number in range(12):
        log.append(lambda records, number=number: {"number": number, "before": len(records)})  # type: ignore[misc]
    records = list(log.read())
    assert [record.seq for record in records] == list(range(1, 13))
    assert [record.event for record in records] == [{"number": n, "before": n} for n in range(12)]
    assert [record.event["number"] for record in log.read(after=10)] == [10, 11]
    assert records[0].time_s == 12.5


def test_many_concurrent_writers_lose_nothing_and_are_serialized(storage: StorageSpec) -> None:
    num_writers, num_each = 4, 4
    failures: list[BaseException] = []

    def write() -> None:
        try:
            log = Sequence(open_store(storage), "log")
            for _ in range(num_each):
                log.append(lambda records: {"version": 1 + max((r.event["version"] for r in records), default=0)})
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(num_writers)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert failures == []
    versions = [record.event["version"] for record in Sequence(open_store(storage), "log").read()]
    assert versions == list(range(1, num_writers * num_each + 1))


def test_a_put_whose_answer_was_lost_is_not_appended_twice(file_store: ObstoreStore) -> None:
    class LosesAnswer(WrappedStore):
        def create(self, key: str, data: bytes) -> None:
            super().create(key, data)
            super().create(key, data)  # what a transport does that retries after a lost answer

    lossy = LosesAnswer(file_store)
    assert Sequence(lossy, "log").append(lambda _: {"once": True}).seq == 1
    assert len(list(Sequence(file_store, "log").read())) == 1


def test_an_altered_record_is_refused(file_store: ObstoreStore) -> None:
    log = Sequence(file_store, "log")
    for _ in range(3):
        log.append(lambda records: {"amount": len(records)})
    key = f"log/log/{2:020d}.json"
    file_store.put(key, file_store.get(key).replace(b'"amount":1', b'"amount":7'))
    with pytest.raises(ObjectCorrupt, match=key):
        list(log.read())


def test_a_record_that_was_replaced_by_a_sealed_one_breaks_the_chain(file_store: ObstoreStore) -> None:
    log, other = Sequence(file_store, "log"), Sequence(file_store, "other")
    for _ in range(3):
        log.append(lambda records: {"amount": len(records)})
        other.append(lambda records: {"amount": 1000 + len(records)})
    file_store.put(f"log/log/{2:020d}.json", file_store.get(f"other/log/{2:020d}.json"))
    with pytest.raises(ObjectCorrupt, match="does not follow"):
        list(log.read())


def test_a_missing_record_is_noticed(file_store: ObstoreStore) -> None:
    log = Sequence(file_store, "log")
    for _ in range(3):
        log.append(lambda _: {})
    file_store.delete([f"log/log/{2:020d}.json"])
    with pytest.raises(ObjectCorrupt, match="record 2 is missing"):
        list(log.read())


def test_a_writer_that_always_loses_gives_up(file_store: ObstoreStore) -> None:
    log = Sequence(file_store, "log")
    num_calls = 0

    def overtaken(_: object) -> dict[str, int]:
        nonlocal num_calls
        num_calls += 1
        log.append(lambda _: {"faster": num_calls})
        return {}

    with pytest.raises(StoreUnavailable, match="lost against other writers"):
        log.append(overtaken)
    assert num_calls == MAX_ATTEMPTS
