import threading

import pytest

from maas_ray.errors import NotFound, SpecError
from maas_ray.registry.models import Registry, Version
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from tests.support.bundles import save_toy_bundle


def test_versions_count_up_and_keep_their_bundle_and_run(store: ObstoreStore) -> None:
    registry = Registry(store)
    first, second = save_toy_bundle(store, b"one", run="r1"), save_toy_bundle(store, b"two", run="r2")
    registry.publish("digits", first)
    assert registry.publish("digits", second).version == 2
    assert registry.publish("other", first).version == 1
    version = Registry(store).resolve("digits", 2)
    assert (version.bundle, version.run) == (second, "r2")
    assert Registry(store).resolve("digits", "1").bundle == first


def test_an_alias_moves_and_its_history_stays(store: ObstoreStore) -> None:
    registry = Registry(store)
    for graph in (b"one", b"two"):
        registry.publish("digits", save_toy_bundle(store, graph))
    registry.promote("digits", 1)
    registry.promote("digits", 2)
    registry.promote("digits", 1, alias="canary")
    model = Registry(store).model("digits")
    assert model.aliases == {"production": 2, "canary": 1}
    events = [event for _, event in registry.history("digits")]
    assert [event["version"] for event in events if event["type"] == "alias"] == [1, 2, 1]


def test_a_reader_sees_the_records_of_another_process(file_store: ObstoreStore) -> None:
    reader, writer = Registry(file_store), Registry(file_store)
    assert reader.models() == {}
    writer.publish("digits", save_toy_bundle(file_store))
    writer.promote("digits", 1)
    assert reader.resolve("digits").version == 1


def test_two_publishers_at_once_both_succeed_with_different_versions(storage: StorageSpec) -> None:
    bundles = [
        [save_toy_bundle(open_store(storage), f"{writer} {i}".encode()) for i in range(5)] for writer in ("one", "two")
    ]
    start = threading.Barrier(2)
    published: list[Version] = []

    def publish(mine: list[str]) -> None:
        registry = Registry(open_store(storage))
        start.wait(timeout=30)
        for bundle in mine:
            published.append(registry.publish("digits", bundle))

    threads = [threading.Thread(target=publish, args=(mine,)) for mine in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(version.version for version in published) == list(range(1, 11))
    registry = Registry(open_store(storage))
    assert all(registry.resolve("digits", version.version) == version for version in published)


@pytest.mark.parametrize(
    ("model", "ref", "message"),
    [
        ("cats", "production", "no model 'cats' in .*; models: digits"),
        ("digits", 7, "no version 7 of model 'digits'; versions: 1"),
        ("digits", "canary", "no alias 'canary' of model 'digits'; aliases: production"),
    ],
)
def test_a_missing_data_set_or_split_is_reported_with_existing_ones(
    file_store: ObstoreStore, model: str, ref: int | str, message: str
) -> None:
    registry = Registry(file_store)
    registry.publish("digits", save_toy_bundle(file_store))
    registry.promote("digits", 1)
    with pytest.raises(NotFound, match=message):
        registry.resolve(model, ref)


def test_only_existing_versions_can_be_promoted_and_only_existing_bundles_published(file_store: ObstoreStore) -> None:
    registry = Registry(file_store)
    with pytest.raises(NotFound, match="no bundle 'nope'"):
        registry.publish("digits", "nope")
    with pytest.raises(NotFound, match="no model 'digits'"):
        registry.promote("digits", 1)
    registry.publish("digits", save_toy_bundle(file_store))
    with pytest.raises(NotFound, match="no version 2"):
        registry.promote("digits", 2)
    assert registry.model("digits").aliases == {}


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-x", "a" * 101, "ä"])
def test_names_that_cannot_be_part_of_a_url_are_refused(file_store: ObstoreStore, name: str) -> None:
    with pytest.raises(SpecError, match="not a valid name"):
        Registry(file_store).publish(name, save_toy_bundle(file_store))


def test_an_alias_cannot_look_like_a_version(file_store: ObstoreStore) -> None:
    registry = Registry(file_store)
    registry.publish("digits", save_toy_bundle(file_store))
    with pytest.raises(SpecError, match="is a number, which is a version"):
        registry.promote("digits", 1, alias="2")
