"""Refuses a store on which commits would not be safe, before anything is written to it."""

import uuid

from maas_ray.errors import Conflict, StoreUnsafe
from maas_ray.store.objects import ObjectStore

PREFIX = ".probe"


def probe(store: ObjectStore) -> None:
    """Writes, re-creates, reads and deletes one small object.

    Two S3 gateways were measured to accept a second create-only put (`If-None-Match: *`) silently; on such a
    store two writers would both believe that they committed.

    Raises:
        StoreUnsafe: the second create-only put was accepted, or what is read is not what was written.
        StoreDenied: the credentials or the path do not allow writing.
        StoreUnavailable: the store does not answer.
    """
    key = f"{PREFIX}/{uuid.uuid4().hex}"
    store.create(key, b"first")
    try:
        try:
            store.create(key, b"second")
        except Conflict:
            pass
        else:
            raise StoreUnsafe(
                f"{store.uri} accepts a second create-only put of the same key (it ignores If-None-Match), so commits "
                "could overwrite each other; use a store with conditional writes, such as AWS S3, MinIO or a directory"
            )
        if store.get(key) != b"first":
            raise StoreUnsafe(f"{store.uri} does not return what was written to it; do not use it")
    finally:
        store.delete([key])
