"""Two writers of a commit without parts both succeeded: a lost response was recognized by equal parts, `{} ==
{}`."""

import threading

import pytest

from maas_ray.errors import Conflict, NotFound, StoreUnavailable
from maas_ray.store.manifest import CommitWriter, open_committed
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.store.sealed import seal, unseal
from tests.support.faulty import FaultyStore


@pytest.mark.parametrize("parts", [{}, {"one": b"same"}, {"one": b"", "deep/two": b"x"}], ids=["no", "one", "two"])
def test_the_second_of_two_equal_commits_is_a_conflict(store: ObstoreStore, parts: dict[str, bytes]) -> None:
    writers = [CommitWriter(store, "runs/x", "run") for _ in range(2)]
    for writer in writers:
        for name, data in parts.items():
            writer.put(name, data)
    first = writers[0].commit({"who": 1})
    for meta in ({"who": 2}, {"who": 1}):
        with pytest.raises(Conflict, match="committed by another writer"):
            writers[1].commit(meta)
    there = open_committed(store, "runs/x", "run")
    assert (there.meta, there.attempt, there.digest) == ({"who": 1}, first.attempt, first.digest)
    assert all(there.read(name) == data for name, data in parts.items())


def test_of_many_writers_at_once_one_wins(storage: StorageSpec) -> None:
    start, winners, losers = threading.Barrier(6), list[int](), list[int]()

    def write(number: int) -> None:
        writer = CommitWriter(open_store(storage), "runs/x", "run")
        start.wait(timeout=60)
        try:
            winners.append(writer.commit({"who": number}).meta["who"])
        except Conflict:
            losers.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(winners) == 1
    assert sorted([*winners, *losers]) == list(range(6))


@pytest.mark.parametrize("parts", [{}, {"one": b"first part"}], ids=["no parts", "a part"])
def test_a_commit_recognizes_itself_after_a_lost_response(file_store: ObstoreStore, parts: dict[str, bytes]) -> None:
    lossy = FaultyStore(file_store, "timeout after success", 1, where="manifest.json")
    writer = CommitWriter(lossy, "runs/x", "run")
    for name, data in parts.items():
        writer.put(name, data)
    assert writer.commit({"who": 1}).meta == {"who": 1}
    assert writer.commit({"who": 1}).meta == {"who": 1}, "and again when it is repeated"
    with pytest.raises(Conflict, match="already committed by this attempt, with other contents"):
        writer.commit({"who": 2})
    assert all(open_committed(file_store, "runs/x", "run").read(name) == data for name, data in parts.items())


def test_a_lost_commit_is_reported_and_can_be_repeated(file_store: ObstoreStore) -> None:
    writer = CommitWriter(FaultyStore(file_store, "503", 1, where="manifest.json"), "runs/x", "run")
    with pytest.raises(StoreUnavailable):
        writer.commit({"who": 1})
    with pytest.raises(NotFound):
        open_committed(file_store, "runs/x", "run")
    assert writer.commit({"who": 1}).meta == {"who": 1}


def test_a_lost_response_to_another_writers_commit_is_not_taken_for_ours(file_store: ObstoreStore) -> None:
    CommitWriter(file_store, "runs/x", "run").commit({"who": 1})
    with pytest.raises(StoreUnavailable):
        CommitWriter(FaultyStore(file_store, "503", 1, where="manifest.json"), "runs/x", "run").commit({"who": 1})


def test_older_manifests_without_an_attempt_are_read_and_have_no_owner(file_store: ObstoreStore) -> None:
    CommitWriter(file_store, "runs/x", "run").commit({"who": 1})
    body = unseal("runs/x/manifest.json", file_store.get("runs/x/manifest.json"))
    file_store.put("runs/x/manifest.json", seal({k: v for k, v in body.items() if k not in ("attempt", "digest")}))
    assert open_committed(file_store, "runs/x", "run").attempt == ""
    with pytest.raises(Conflict):
        CommitWriter(file_store, "runs/x", "run", attempt=None).commit({"who": 1})
