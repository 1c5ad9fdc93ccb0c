"""The default location of the store is the same wherever it is read."""

from pathlib import Path

import pytest

from maas_ray import api
from maas_ray.api.stores import open_store
from maas_ray.cli.options import DEFAULT_STORE
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.store.objects import StorageSpec
from maas_ray.train.search.space import draw_trials
from maas_ray.train.search.spec import TuneSpec
from maas_ray.train.spec.train import TrainSpec

TRAIN = {"run": "r", "model": {"name": "mlp"}, "data": {"uri": "sklearn:wine", "task": "classification"}}
SERVE = {"pools": [{"models": [{"name": "m"}]}]}
SEARCH = {"name": "s", "base": TRAIN, "search": {"optimizer.lr": {"kind": "choice", "categories": [0.1]}}, "trials": 1}


def _trial(document: object) -> TrainSpec:
    return draw_trials(TuneSpec.model_validate(document))[0].spec


@pytest.mark.parametrize(
    ("read", "document"),
    [(TrainSpec.model_validate, TRAIN), (ServeSpec.model_validate, SERVE), (_trial, SEARCH)],
    ids=["train", "serve", "tune"],
)
def test_the_variable_is_the_default_of_every_spec(
    read: object, document: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAAS_RAY_STORE", raising=False)
    monkeypatch.delenv("MAAS_RAY_ENDPOINT", raising=False)
    assert (read(document).storage.uri, read(document).storage.endpoint) == (DEFAULT_STORE, None)  # type: ignore[operator]
    monkeypatch.setenv("MAAS_RAY_STORE", "s3://bucket/models")
    monkeypatch.setenv("MAAS_RAY_ENDPOINT", "http://127.0.0.1:9000")
    storage = read(document).storage  # type: ignore[operator]
    assert (storage.uri, storage.endpoint) == ("s3://bucket/models", "http://127.0.0.1:9000")
    given = {**document, "storage": {"uri": "own", "endpoint": None}} if read is not _trial else None  # type: ignore[dict-item]
    if given is not None:
        assert (read(given).storage.uri, read(given).storage.endpoint) == ("own", None)  # type: ignore[operator]


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAAS_RAY_STORE", "")
    assert StorageSpec().uri == DEFAULT_STORE


def test_the_python_api_and_the_specs_open_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAAS_RAY_STORE", str(tmp_path / "chosen"))
    assert open_store().uri == StorageSpec().location == f"file://{tmp_path}/chosen"
    assert api.stores.open_store(str(tmp_path / "own")).uri == f"file://{tmp_path}/own"


def test_the_source_of_the_default_does_not_change_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    written = TrainSpec.model_validate({**TRAIN, "storage": {"uri": "s3://bucket/models"}})
    monkeypatch.setenv("MAAS_RAY_STORE", "s3://bucket/models")
    inherited = TrainSpec.model_validate(TRAIN)
    assert written.digest() == inherited.digest()
    assert written.same_training(inherited) == []


def test_a_stored_spec_ignores_the_variables_of_the_process_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = TrainSpec.model_validate({**TRAIN, "storage": {"uri": "s3://bucket/models"}}).model_dump_json()
    monkeypatch.setenv("MAAS_RAY_STORE", "s3://other")
    monkeypatch.setenv("MAAS_RAY_ENDPOINT", "http://other:9000")
    assert TrainSpec.model_validate_json(stored).storage == StorageSpec(uri="s3://bucket/models", endpoint=None)


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        (StorageSpec(uri="s3://bucket/models", endpoint=None), "s3://bucket/models"),
        (StorageSpec(uri="s3://b", endpoint="http://me:secret@host:9000"), "s3://b at http://***@host:9000"),
        (StorageSpec(uri="az://user:secret@container", endpoint=None), "az://***@container"),
    ],
)
def test_a_location_shows_no_password(storage: StorageSpec, shown: str) -> None:
    assert storage.location == shown
