"""Runs that an older version started: their specs have the same digests, and they can be resumed."""

from typing import Any

from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs
from maas_ray.train.spec.train import TrainSpec

DOCUMENT: dict[str, Any] = {
    "run": "museum",
    "storage": {"uri": "file:///data/store"},
    "data": {"uri": "file:///data/iris.csv", "target": "species", "task": "classification"},
    "model": {"name": "mlp"},
    "epochs": 2,
}
OLD_DIGESTS = (
    "4f445d8fc79be0eef648faeef73261110b22f89aa256ef55ec3f6b91d8bc8316",
    "73bbf7f49c24099538d33295973c0bd3a02850b721e42c417bbbe5ac0e5b6981",
)
"""Of the whole spec and of its data, as computed without the field `max_expansion`."""


def test_a_new_field_at_its_default_leaves_the_digests_of_older_versions() -> None:
    spec = parse_spec(TrainSpec, DOCUMENT)
    assert (spec.digest(), spec.data.digest()) == OLD_DIGESTS
    other = parse_spec(TrainSpec, DOCUMENT, ["data.max_expansion=200"])
    assert other.digest() != spec.digest()
    assert TrainSpec.model_validate(other.model_dump(mode="json")) == other, "another value is written down"


def test_a_run_of_an_older_version_can_be_resumed_with_more_expansion(file_store: ObstoreStore) -> None:
    spec = parse_spec(TrainSpec, DOCUMENT)
    written = spec.model_dump(mode="json")
    assert "max_expansion" not in written["data"], "what the older version wrote"
    run = Runs(file_store).create(spec, "d" * 64, None)
    assert run.spec.digest() == OLD_DIGESTS[0]
    assert run.spec.same_training(parse_spec(TrainSpec, DOCUMENT, ["data.max_expansion=200"])) == []
    assert run.spec.same_training(parse_spec(TrainSpec, DOCUMENT, ["data.delimiter=;"])) == ["data"]
