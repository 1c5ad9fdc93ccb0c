"""Rejects a store on which commits would not be safe, before data is written to it."""

import uuid

from maas_ray.errors import Conflict, StoreUnsafe
from maas_ray.store.objects import ObjectStore

PREFIX = ".probe"


def probe(store: ObjectStore) -> None:
    """Writes, re-creates, reads and deletes one small object.

    Two S3 gateways were measured to accept a second create-only put (`If-None-Match: *`) silently; on such a
    store two writers would both report a successful commit.

    Raises:
        StoreUnsafe: the second create-only put was accepted, or the bytes read differ from the bytes written.
        StoreDenied: the credentials or the path do not allow writing.
        StoreUnavailable: the store does not respond.
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
            raise StoreUnsafe(f"{store.uri} does not return the bytes that were written to it; use another store")
    finally:
        store.delete([key])
