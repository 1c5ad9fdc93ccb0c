"""Opens the store of an API call."""

from maas_ray.store.objects import ObjectStore, StorageSpec
from maas_ray.store.objects import open_store as open_spec


def open_store(uri: str | None = None, *, endpoint: str | None = None) -> ObjectStore:
    """Opens a store.

    Args:
        uri: a directory, `s3://bucket/prefix`, `gs://…` or `az://…`; None: $MAAS_RAY_STORE, else `.maas-ray/store`.
        endpoint: URL of an S3-compatible service other than AWS; None: $MAAS_RAY_ENDPOINT.

    Raises:
        SpecError: the URI's scheme is unknown.
        StoreDenied: a local directory cannot be created.
    """
    given = {"uri": uri, "endpoint": endpoint}
    return open_spec(StorageSpec(**{name: value for name, value in given.items() if value}))


def opened(store: ObjectStore | str | None) -> ObjectStore:
    """Returns an open store unchanged; else opens the one of a URI, or of the environment."""
    return open_store(store) if store is None or isinstance(store, str) else store
