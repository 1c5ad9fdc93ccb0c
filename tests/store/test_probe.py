import pytest

from maas_ray.errors import StoreUnsafe
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.probe import probe
from tests.support.faulty import WrappedStore


class _IgnoresConditions(WrappedStore):
    """What two S3 gateways were seen to do: a create-only put of an existing key succeeds."""

    def create(self, key: str, data: bytes) -> None:
        self.put(key, data)


def test_a_sound_store_passes_and_is_left_empty(store: ObstoreStore) -> None:
    probe(store)
    assert list(store.scan("")) == []


def test_a_store_that_ignores_create_only_puts_is_refused(store: ObstoreStore) -> None:
    unsafe = _IgnoresConditions(store)
    with pytest.raises(StoreUnsafe, match="accepts a second create-only put"):
        probe(unsafe)
    assert list(store.scan("")) == []
