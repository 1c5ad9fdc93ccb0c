"""Opens the store of an API call."""

import os

from maas_ray.store.objects import ObjectStore, StorageSpec
from maas_ray.store.objects import open_store as open_spec

STORE_VARIABLE = "MAAS_RAY_STORE"
ENDPOINT_VARIABLE = "MAAS_RAY_ENDPOINT"


def open_store(uri: str | None = None, *, endpoint: str | None = None) -> ObjectStore:
    """Opens a store.

    Args:
        uri: a directory, `s3://bucket/prefix`, `gs://…` or `az://…`; None: $MAAS_RAY_STORE, else `.maas-ray/store`.
        endpoint: URL of an S3-compatible service other than AWS; None: $MAAS_RAY_ENDPOINT.

    Raises:
        SpecError: the URI's scheme is unknown.
        StoreDenied: a local directory cannot be created.
    """
    uri = uri or os.environ.get(STORE_VARIABLE) or StorageSpec().uri
    return open_spec(StorageSpec(uri=uri, endpoint=endpoint or os.environ.get(ENDPOINT_VARIABLE)))


def opened(store: ObjectStore | str | None) -> ObjectStore:
    """Returns an open store unchanged; else opens the one of a URI, or of the environment."""
    return open_store(store) if store is None or isinstance(store, str) else store
