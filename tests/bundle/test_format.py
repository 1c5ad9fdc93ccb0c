import pytest

from maas_ray.bundle.format import GRAPH, PREFIX, load_bundle, load_info
from maas_ray.errors import NotFound, ObjectCorrupt
from maas_ray.store.manifest import list_committed, open_committed
from maas_ray.store.objects import ObstoreStore
from tests.support.bundles import save_toy_bundle, toy_info


def test_a_bundle_is_loaded_as_it_was_saved(store: ObstoreStore) -> None:
    bundle_id = save_toy_bundle(store, b"some graph")
    bundle = load_bundle(store, bundle_id)
    assert bundle.graph == b"some graph"
    assert bundle.info == toy_info() == load_info(store, bundle_id)
    assert list_committed(store, PREFIX) == [bundle_id]


def test_the_same_content_is_the_same_bundle_and_other_content_another(file_store: ObstoreStore) -> None:
    first = save_toy_bundle(file_store, b"one")
    assert save_toy_bundle(file_store, b"one") == first
    assert save_toy_bundle(file_store, b"two") != first
    assert save_toy_bundle(file_store, b"one", run="other") != first


def test_an_altered_graph_is_refused_by_name(store: ObstoreStore) -> None:
    bundle_id = save_toy_bundle(store, b"some graph")
    key = open_committed(store, f"bundles/{bundle_id}", "bundle").parts[GRAPH].key
    store.put(key, b"same graph")
    with pytest.raises(ObjectCorrupt) as caught:
        load_bundle(store, bundle_id)
    assert key in str(caught.value)


def test_an_unknown_bundle_is_not_found(file_store: ObstoreStore) -> None:
    with pytest.raises(NotFound, match="no bundle 'nope'"):
        load_bundle(file_store, "nope")


def test_a_signature_is_batched_only_if_every_tensor_has_a_variable_first_dimension() -> None:
    signature = toy_info().signature
    assert signature.is_batched
    fixed = signature.inputs[0].model_copy(update={"shape": (1, 4)})
    assert not signature.model_copy(update={"inputs": (fixed,)}).is_batched
