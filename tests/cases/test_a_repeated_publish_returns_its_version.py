"""S3 responses lost after success: 8 of 160 publishes reported "unavailable" but were written, and a retry
published another version."""

import random
import threading
from collections import Counter

import pytest

from maas_ray.errors import SpecError, StoreUnavailable
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.store.sequence import Sequence
from tests.support.bundles import save_toy_bundle
from tests.support.faulty import FaultyStore, WrappedStore

WRITERS = 4


class LossyStore(WrappedStore):
    """Loses the responses of a share of create-only puts after they succeeded, and of another share before."""

    def __init__(self, store: ObstoreStore, seed: int, share: float) -> None:
        super().__init__(store)
        self._random = random.Random(seed)
        self._share = share
        self.num_lost = 0

    def create(self, key: str, data: bytes) -> None:
        drawn = self._random.random()
        if drawn < self._share / 2:
            self.num_lost += 1
            raise StoreUnavailable("the request was lost")
        super().create(key, data)
        if drawn < self._share:
            self.num_lost += 1
            raise StoreUnavailable("the answer was lost")


@pytest.mark.parametrize("each", [5, pytest.param(40, marks=pytest.mark.fault)])
def test_every_publish_of_four_writers_is_one_version_although_answers_are_lost(
    storage: StorageSpec, each: int
) -> None:
    bundles = [[save_toy_bundle(open_store(storage), f"{w} {i}".encode()) for i in range(each)] for w in range(WRITERS)]
    stores = [LossyStore(open_store(storage), seed, share=0.4) for seed in range(WRITERS)]
    said: list[tuple[int, str]] = []
    num_repeats = 0

    def publish(store: LossyStore, mine: list[str]) -> None:
        nonlocal num_repeats
        registry = Registry(store)
        for bundle in mine:
            while True:
                try:
                    said.append((registry.publish("digits", bundle).version, bundle))
                    break
                except StoreUnavailable:
                    num_repeats += 1
                    registry = Registry(store)  # another process: a user who repeats the command

    threads = [threading.Thread(target=publish, args=pair) for pair in zip(stores, bundles, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=400)
    versions = Registry(open_store(storage)).model("digits").versions
    assert sum(store.num_lost for store in stores) > WRITERS * each // 8, "the fault was planted"
    assert Counter(version.bundle for version in versions.values()) == Counter(b for mine in bundles for b in mine)
    assert sorted(said) == sorted((number, version.bundle) for number, version in versions.items())


@pytest.mark.parametrize("is_new_process", [True, False])
def test_a_publish_that_reported_unavailable_is_found_by_its_repeat(
    file_store: ObstoreStore, is_new_process: bool
) -> None:
    bundle, other = save_toy_bundle(file_store, b"one"), save_toy_bundle(file_store, b"two")
    away = FaultyStore(file_store, "timeout after success", 1, where="registry/", is_lasting=True)
    registry = Registry(away)
    published = registry.publish("digits", bundle)
    Registry(file_store).publish("digits", other)
    again = (Registry(file_store) if is_new_process else registry).publish("digits", bundle)
    assert again == published
    assert list(Registry(file_store).model("digits").versions) == [1, 2]


def test_a_bundle_is_made_another_version_with_a_token_and_that_repeat_finds_itself_too(
    file_store: ObstoreStore,
) -> None:
    bundle, other = save_toy_bundle(file_store, b"one"), save_toy_bundle(file_store, b"two")
    registry = Registry(file_store)
    assert [registry.publish("digits", bundle, token=token).version for token in (None, "b", "b", None)] == [1, 2, 2, 1]
    with pytest.raises(SpecError, match="published version 2 of model 'digits' from another bundle"):
        registry.publish("digits", other, token="b")


def test_versions_of_before_tokens_are_found_by_their_bundle(file_store: ObstoreStore) -> None:
    bundle = save_toy_bundle(file_store)
    event = {"type": "publish", "model": "digits", "version": 1, "bundle": bundle, "run": "toy"}
    Sequence(file_store, "registry").append(lambda _: event)
    assert Registry(file_store).publish("digits", bundle).version == 1


@pytest.mark.parametrize("fault", ["timeout after success", "503"])
def test_an_append_with_an_uncertain_put_is_stored_once(file_store: ObstoreStore, fault: str) -> None:
    for at in (1, 2, 3):
        Sequence(FaultyStore(file_store, fault, at), f"log{at}").append(lambda _: {"once": True})
        assert len(list(Sequence(file_store, f"log{at}").read())) == 1


def test_a_store_that_stays_away_is_reported(file_store: ObstoreStore) -> None:
    with pytest.raises(StoreUnavailable):
        Sequence(FaultyStore(file_store, "503", 1, is_lasting=True), "log").append(lambda _: {})
    assert list(Sequence(file_store, "log").read()) == []


def test_a_promotion_that_is_repeated_appends_nothing(file_store: ObstoreStore) -> None:
    registry = Registry(file_store)
    registry.publish("digits", save_toy_bundle(file_store))
    assert [registry.promote("digits", 1).version for _ in range(3)] == [1, 1, 1]
    assert len(list(Sequence(file_store, "registry").read())) == 2
