"""Stores that earlier versions have written are read, added to and checked as their own version would have done."""

import json
from pathlib import Path

import pytest

from benchmarks.store.filling import memory_store
from maas_ray.cli.checks import all_checks
from maas_ray.registry.models import Registry
from maas_ray.serve.models.desired_state import DesiredState
from maas_ray.store.fsck import fsck
from maas_ray.store.log.compact import compact
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Sequence
from maas_ray.train.records.runs import Runs


@pytest.fixture
def before_snapshots() -> ObstoreStore:
    """21 records of the registry, 3 desired models of a pool, a finished and a failed run; no snapshot, no index."""
    store = memory_store()
    text = Path(__file__).with_name("store_before_snapshots.json").read_text()
    for key, data in json.loads(text).items():
        store.create(key, data.encode())
    return store


def check(store: ObstoreStore) -> None:
    models = Registry(store).models()
    assert {name: (len(model.versions), model.aliases) for name, model in models.items()} == {
        "digits": (9, {"production": 5}),
        "cats": (9, {"canary": 1}),
    }
    assert {name: desired.is_load for name, desired in DesiredState(store, "default").models().items()} == {
        "digits": False,
        "cats": True,
    }
    found, damaged = Runs(store).survey()
    assert damaged == {}
    assert [(run.id, run.status, run.step, dict(run.metrics), run.unvalidated) for run in found] == [
        ("second", "failed", None, {}, {4: "no room"}),
        ("first", "finished", 9, {"loss": 0.5}, {}),
    ]
    assert Runs(store).get("first").spec.model.name == "mlp"
    assert fsck(store, checks=all_checks()).problems == []


def test_a_store_without_snapshots_and_index_is_read(before_snapshots: ObstoreStore) -> None:
    for _ in range(2):
        check(before_snapshots)


def test_a_store_without_snapshots_gets_them_by_the_next_writer(before_snapshots: ObstoreStore) -> None:
    registry = Registry(before_snapshots)
    bundle = registry.resolve("digits").bundle
    assert registry.publish("digits", bundle, token="t4").version == 3, "a publish of before is found again"
    registry.promote("digits", 4, "canary")
    assert any(info.key.endswith(".jsonl") for info in before_snapshots.scan("registry/log"))
    assert compact(before_snapshots, "registry").written == ()
    assert Registry(before_snapshots).resolve("digits", "canary").version == 4


def test_compaction_changes_no_record(before_snapshots: ObstoreStore) -> None:
    records = list(Sequence(before_snapshots, "registry").read())
    assert len(compact(before_snapshots, "registry").written) == 1
    assert list(Sequence(before_snapshots, "registry").read()) == records
    check(before_snapshots)
