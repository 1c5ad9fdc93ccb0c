import errno
import mmap
import os

import boto3
import pytest

from maas_ray.errors import Conflict, MaasError, NotFound, SpecError, StoreDenied, StoreError, StoreUnavailable
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store


def test_a_key_can_be_created_only_once(store: ObstoreStore) -> None:
    store.create("a/b", b"first")
    with pytest.raises(Conflict, match="a/b already exists"):
        store.create("a/b", b"second")
    assert store.get("a/b") == b"first"


def test_ranges_of_an_object_are_read_without_the_rest(store: ObstoreStore) -> None:
    store.create("a/b", b"0123456789")
    assert store.get_ranges("a/b", [(8, 10), (0, 3), (3, 4)]) == [b"89", b"012", b"3"]
    assert store.get_ranges("a/b", [(8, 12)]) == [b"89"], "what reaches beyond the end is shorter"
    with pytest.raises(StoreError):
        store.get_ranges("a/b", [(20, 22)])
    with pytest.raises(NotFound, match="no object .*a/c"):
        store.get_ranges("a/c", [(0, 1)])


def test_a_missing_key_is_not_found_and_can_be_deleted(store: ObstoreStore) -> None:
    with pytest.raises(NotFound, match="no object .*a/b"):
        store.get("a/b")
    store.delete(["a/b"])


def test_scan_is_sorted_and_starts_after_a_key(store: ObstoreStore) -> None:
    for name in ("c", "a", "b/x"):
        store.create(f"p/{name}", b"12")
    assert [info.key for info in store.scan("p")] == ["p/a", "p/b/x", "p/c"]
    assert [info.key for info in store.scan("p", after="p/a")] == ["p/b/x", "p/c"]
    assert {info.size for info in store.scan("p")} == {2}
    assert store.children("") == ["p"]
    assert store.children("p") == ["b"]


def test_deleting_the_last_object_leaves_no_directory(file_store: ObstoreStore) -> None:
    file_store.create("a/b/c", b"")
    file_store.delete(["a/b/c"])
    assert file_store.root is not None
    assert os.listdir(file_store.root) == []


def test_large_objects_go_up_in_parts(store: ObstoreStore) -> None:
    data = os.urandom(1 << 20) * 12
    store.put("large", data)
    assert store.get("large") == data


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/path", "unknown scheme 'ftp'; use one of file, s3, gs, az"),
        ("s3://", "names no bucket"),
        ("az://container/path", "cannot be opened with this environment: .*Account must be specified"),
    ],
)
def test_a_uri_that_no_store_has_is_refused(uri: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        open_store(uri)


def test_a_directory_that_cannot_be_written_is_named() -> None:
    with pytest.raises(StoreDenied, match="/proc/nowhere.*choose a directory"):
        open_store("file:///proc/nowhere")


def test_a_bucket_that_does_not_exist_is_an_error_with_its_name(s3_endpoint: str) -> None:
    store = open_store(StorageSpec(uri="s3://nobody/x", endpoint=s3_endpoint))
    with pytest.raises(MaasError, match="s3://nobody/x/key"):
        store.create("key", b"")


def test_a_service_that_does_not_answer_is_unavailable_and_retryable(free_port: int) -> None:
    store = open_store(StorageSpec(uri="s3://maas/x", endpoint=f"http://127.0.0.1:{free_port}"))
    with pytest.raises(StoreUnavailable, match="within the retry limit") as caught:
        store.get("key")
    assert caught.value.retryable


@pytest.mark.parametrize("size", [0, 4095, 1 << 20, (3 << 20) + 5, (9 << 20) + 4096])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
def test_bytes_that_go_past_the_page_cache_are_the_same(file_store: ObstoreStore, size: int, offset: int) -> None:
    data = os.urandom(1 << 20) * 10
    memory = mmap.mmap(-1, 11 << 20)  # begins with a page
    memory[offset : offset + size] = data[:size]
    file_store.put("a/b", memoryview(memory)[offset : offset + size])
    assert file_store.get("a/b") == data[:size]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/./b", "a/b#1", "a\0b"])
def test_a_key_that_is_not_a_path_below_the_store_is_refused(file_store: ObstoreStore, key: str) -> None:
    for put in (file_store.put, file_store.create):
        with pytest.raises(StoreError, match="not a valid object key"):
            put(key, b"x")
    assert list(file_store.scan("")) == []


def test_a_write_that_fails_leaves_nothing(file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for put in (file_store.put, file_store.create):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match="no space is left for .*; free space"):
                put("a/b", b"x")
        assert list(file_store.scan("")) == list(file_store.staged()) == []


def test_markers_of_directories_are_listed_like_any_object(s3_endpoint: str) -> None:
    """Other programs' S3 clients make them, also of the store itself."""
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for key in ("marked/", "marked/ray/", "marked/ray-1/x", "marked/ray/y"):
        client.put_object(Bucket="maas", Key=key, Body=b"")
    client.close()
    store = open_store(StorageSpec(uri="s3://maas/marked", endpoint=s3_endpoint))
    assert sorted(info.key for info in store.scan("")) == ["", "ray", "ray-1/x", "ray/y"]
    assert store.children("") == ["ray", "ray-1"]
