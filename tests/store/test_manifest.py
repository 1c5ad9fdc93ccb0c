from collections.abc import Callable

import pytest

from maas_ray.errors import Conflict, NotFound, ObjectCorrupt
from maas_ray.store.manifest import (
    Committed,
    CommitWriter,
    Part,
    list_committed,
    open_committed,
    part_digest,
    part_key,
    verify,
)
from maas_ray.store.objects import ObstoreStore


def _commit(store: ObstoreStore, prefix: str = "things/a") -> Committed:
    writer = CommitWriter(store, prefix, "thing")
    writer.put("one", b"first part")
    writer.put("deep/two", b"second part")
    return writer.commit({"answer": 42})


def test_what_is_committed_is_read_back(store: ObstoreStore) -> None:
    written = _commit(store)
    read = open_committed(store, "things/a", "thing")
    assert read.meta == {"answer": 42}
    assert read.read("deep/two") == b"second part"
    assert read.digest == written.digest
    assert verify(read) == []


def test_without_a_manifest_nothing_is_there(store: ObstoreStore) -> None:
    CommitWriter(store, "things/a", "thing").put("one", b"first part")
    assert list_committed(store, "things") == []
    with pytest.raises(NotFound):
        open_committed(store, "things/a", "thing")


def test_only_direct_children_are_listed(store: ObstoreStore) -> None:
    _commit(store, "things/b")
    _commit(store, "things/a")
    _commit(store, "things/a/inner/c")
    assert list_committed(store, "things") == ["a", "b"]


def test_the_second_writer_of_a_prefix_loses_and_cleans_up_after_itself(store: ObstoreStore) -> None:
    _commit(store)
    num_objects = len(list(store.scan("")))
    with pytest.raises(Conflict, match="committed by another writer"):
        _commit(store)
    assert len(list(store.scan(""))) == num_objects
    assert verify(open_committed(store, "things/a", "thing")) == []


def test_a_commit_with_a_lost_response_is_recognized_as_our_own(file_store: ObstoreStore) -> None:
    writer = CommitWriter(file_store, "things/a", "thing")
    writer.put("one", b"first part")
    first = writer.commit({})
    assert writer.commit({}).digest == first.digest


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [(_flip, "sha256"), (lambda data: data[:-1], "has 9 bytes instead of 10"), (None, "is missing")],
    ids=["flipped byte", "truncated", "missing"],
)
def test_a_damaged_part_is_refused_by_name(
    store: ObstoreStore, change: Callable[[bytes], bytes] | None, message: str
) -> None:
    key = _commit(store).parts["one"].key
    data = store.get(key)
    store.delete([key])
    if change is not None:
        store.put(key, change(data))
    damaged = open_committed(store, "things/a", "thing")
    with pytest.raises(ObjectCorrupt, match=message) as caught:
        damaged.read("one")
    assert key in str(caught.value)
    assert [str(problem) for problem in verify(damaged)] == [str(caught.value)]


def test_a_part_that_was_hashed_in_pieces_by_another_process_is_verified_like_any_other(store: ObstoreStore) -> None:
    key = part_key("things/a", "0" * 32, "one")
    store.put(key, b"headvalues")
    writer = CommitWriter(store, "things/a", "thing", "0" * 32)
    writer.add("one", Part(key, 10, part_digest(b"headvalues", (4, 6)), (4, 6)))
    committed = writer.commit({})
    assert committed.parts["one"].pieces == (4, 6)
    assert committed.read("one") == b"headvalues"
    for damaged in (b"heedvalues", b"headvaluez", b"headvalue"):
        store.put(key, damaged)
        assert [key in str(problem) for problem in verify(committed)] == [True]
    assert part_digest(b"headvalues", (4, 6)) != part_digest(b"headvalues", (6, 4))
    assert part_digest(b"headvalues", (4, 5)) != part_digest(b"headvalues", (4, 6))


@pytest.mark.parametrize("position", [0, 30, -20])
def test_a_flipped_byte_anywhere_in_the_manifest_is_refused(file_store: ObstoreStore, position: int) -> None:
    _commit(file_store)
    key = "things/a/manifest.json"
    data = bytearray(file_store.get(key))
    data[position] ^= 1
    file_store.put(key, bytes(data))
    with pytest.raises(ObjectCorrupt, match="things/a/manifest.json"):
        open_committed(file_store, "things/a", "thing")


def test_a_manifest_of_another_kind_is_refused(file_store: ObstoreStore) -> None:
    _commit(file_store)
    with pytest.raises(ObjectCorrupt, match="is a 'thing' of format 1; expected a 'bundle'"):
        open_committed(file_store, "things/a", "bundle")


def test_a_deleted_commit_is_gone_with_all_its_parts(store: ObstoreStore) -> None:
    _commit(store).delete()
    assert list(store.scan("")) == []
