"""Record of the served pools in the store: the newest description of each pool, until it is ended."""

from typing import Any

import pytest

from maas_ray.cli.checks import all_checks
from maas_ray.errors import ObjectCorrupt
from maas_ray.serve.deploy.record import PREFIX, forget, latest, record
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Sequence


def described(store: ObstoreStore, *names: str, **more: Any) -> ServeSpec:
    pools = [{"name": name, "route_prefix": f"/{name}", "models": [{"name": "m"}]} for name in names]
    return parse_spec(ServeSpec, {"storage": {"uri": store.uri}, "pools": pools, **more})


def names_of(store: ObstoreStore, cluster: str = "default") -> list[str]:
    found = latest(store, cluster)
    return [] if found is None else [pool.name for pool in found.pools]


def test_pools_of_all_commands_are_in_force_until_they_are_ended(store: ObstoreStore) -> None:
    assert latest(store) is None
    forget(store, "default", ["a"])  # never served: nothing is written
    assert latest(store) is None
    record(store, described(store, "a", "b"), ["a", "b"])
    record(store, described(store, "c", http={"port": 9001}), ["c"])
    found = latest(store)
    assert found is not None
    assert found == described(store, "a", "b", "c", http={"port": 9001})
    forget(store, "default", ["a", "c"])
    assert names_of(store) == ["b"]
    forget(store, "default", ["b"])
    assert latest(store) is None


def test_a_pool_that_was_rolled_back_is_recorded_as_it_was(file_store: ObstoreStore) -> None:
    record(file_store, described(file_store, "a", "b"), ["a", "b"])
    changed = described(file_store, "a", "b", profile="portable")
    changed = changed.model_copy(
        update={"pools": tuple(pool.model_copy(update={"server_name": "new"}) for pool in changed.pools)}
    )
    record(file_store, changed, ["b"])
    found = latest(file_store)
    assert found is not None
    assert {pool.name: pool.server_name for pool in found.pools} == {"a": "maas-ray", "b": "new"}


def test_clusters_of_one_store_have_records_of_their_own(file_store: ObstoreStore) -> None:
    record(file_store, described(file_store, "a", cluster="east"), ["a"])
    assert names_of(file_store, "east") == ["a"]
    assert names_of(file_store) == []


def test_a_malformed_record_is_named_by_fsck_and_never_used(file_store: ObstoreStore) -> None:
    record(file_store, described(file_store, "a"), ["a"])
    assert fsck(file_store, checks=all_checks()).problems == []
    Sequence(file_store, f"{PREFIX}/default").append(lambda _: {"type": "served", "pools": "a"})
    with pytest.raises(ObjectCorrupt, match=f"{PREFIX}/default/log/0*2.json is malformed: pools"):
        latest(file_store)
    assert len(fsck(file_store, checks=all_checks()).problems) == 1
