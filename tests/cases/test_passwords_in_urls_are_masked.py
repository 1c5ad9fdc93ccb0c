"""A secret in `storage.endpoint` (`http://user:SECRET@host`) appeared in error texts."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from maas_ray.cli.app import app
from maas_ray.client import Client
from maas_ray.cluster import connect
from maas_ray.display import get_logger, mask, masked, shown
from maas_ray.errors import MaasError, SpecError, StoreError
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import load_spec, parse_spec
from maas_ray.store import objects
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.train.records.runs import Runs
from maas_ray.train.search.log import SearchLog
from maas_ray.train.search.spec import TuneSpec
from maas_ray.train.spec.train import TrainSpec
from tests.support.onnx_models import linear

SECRET = "hunter2Secret"
ENDPOINT = f"http://user:{SECRET}@127.0.0.1:9"
DATA = {"uri": f"https://user:{SECRET}@host/rows.csv", "task": "classification", "target": "y"}


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers at the endpoint, and no test has to wait for it."""
    from datetime import timedelta

    monkeypatch.setattr(objects, "RETRY", {"max_retries": 0, "retry_timeout": timedelta(seconds=1)})


COMMANDS: list[list[str]] = [
    ["runs"],
    ["models"],
    ["models", "m"],
    ["fsck"],
    ["promote", "m", "1"],
    ["checkpoints", "list", "r"],
    ["checkpoints", "verify", "r"],
    ["import", "model.onnx", "--name", "m"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_shows_the_password_of_the_endpoint(
    no_patience: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(linear(2.0))
    for flags in ([], ["--json"], ["--json", "--debug"]):
        for store, endpoint in (
            ("s3://bucket/maas", ENDPOINT),
            (f"s3://user:{SECRET}@bucket/maas", "http://127.0.0.1:9"),
        ):
            done = CliRunner().invoke(app, [*command, "--store", store, "--endpoint", endpoint, *flags])
            assert done.exit_code != 0
            assert "error[" in done.stderr
            assert SECRET not in done.stdout + done.stderr + repr(done.exception)


@pytest.mark.parametrize("command", [["train"], ["tune"], ["lr-range"], ["verify-parallel"], ["serve"]], ids=" ".join)
def test_no_refused_spec_shows_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"ray://user:{SECRET}@host:1")
    storage = {"uri": f"s3://user:{SECRET}@bucket", "endpoint": [ENDPOINT]}
    documents: list[dict[str, Any]] = [
        {"storage": storage, "run": ENDPOINT, "base": {"storage": storage}, "pools": ENDPOINT, "data": DATA},
        {"storage": {"uri": ENDPOINT, "nowhere": ENDPOINT}, f"https://user:{SECRET}@host": 1},
    ]
    for document in documents:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(document))
        for flags in ([], ["--json"], ["--debug"]):
            done = CliRunner().invoke(app, [*command, str(path), "--set", f"storage.endpoint={ENDPOINT}/x", *flags])
            assert done.exit_code != 0
            assert SECRET not in done.stdout + done.stderr + repr(done.exception)


def test_an_unreachable_endpoint_is_named_without_the_password(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[{}]")
    done = CliRunner().invoke(app, ["predict", "m", "--input", str(rows), "--url", ENDPOINT])
    assert "nothing answers at http://***@127.0.0.1:9/v2/models/m" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    with pytest.raises(MaasError) as caught:
        Client(ENDPOINT).inputs("m")
    assert SECRET not in str(caught.value)
    with pytest.raises(MaasError) as caught:
        connect(address=f"http://user:{SECRET}@host:1")
    assert SECRET not in str(caught.value)


def test_proxies_are_masked_too(no_patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://user:{SECRET}@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    store = open_store(StorageSpec(uri="s3://bucket", endpoint="http://192.0.2.1:9"))
    with pytest.raises(StoreError) as caught:
        store.get("x")
    assert SECRET not in str(caught.value)
    with pytest.raises(MaasError) as caught:
        Client("http://192.0.2.1:9").inputs("m")
    assert SECRET not in str(caught.value)
    with pytest.raises(requests.RequestException):
        requests.get("http://192.0.2.1:9", timeout=1)


def test_specs_and_records_do_not_show_it(file_store: objects.ObstoreStore) -> None:
    storage = {"uri": file_store.uri, "endpoint": ENDPOINT}
    spec = TrainSpec.model_validate({"run": "r", "model": {"name": "mlp"}, "data": DATA, "storage": storage})
    assert SECRET not in f"{spec!r}{spec}{spec.storage!r}{spec.data}"
    assert spec.storage.endpoint == ENDPOINT, "it is masked where it is shown, and used where it is needed"
    run = Runs(file_store).create(spec, "d" * 64, None, {"hf": ENDPOINT})
    assert run.spec.same_training(spec) == [], "and the run can be resumed"
    tune = TuneSpec.model_validate(
        {
            "name": "s",
            "base": spec.model_dump(mode="json"),
            "search": {"optimizer.lr": {"kind": "uniform", "lower": 0.1, "upper": 1}},
        }
    )
    log = SearchLog(file_store, "s")
    log.begin(tune)
    log.resume(tune)
    for info in file_store.scan(""):
        assert SECRET.encode() not in file_store.get(info.key), info.key
    served = {"storage": storage, "pools": [{"name": "p", "models": [{"name": "m"}]}]}
    served["tracing"] = {"endpoint": ENDPOINT}
    try:
        shown_spec = repr(ServeSpec.model_validate(served))
    except ValidationError as error:
        shown_spec = str(error)
    assert SECRET not in shown_spec


def test_logs_do_not_show_it(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("maas_ray.tests.of_masks")
    assert get_logger("maas_ray.tests.of_masks").filters == log.filters, "one filter"
    try:
        raise OSError(f"cannot reach {ENDPOINT}")
    except OSError:
        log.warning("the store %s is away: %s", ENDPOINT, {"url": ENDPOINT}, exc_info=True)
    assert "http://***@127.0.0.1:9" in caplog.text
    assert SECRET not in caplog.text
    logging.getLogger("maas_ray.tests.of_masks.plain").warning("%s", ENDPOINT)
    assert SECRET in caplog.text, "the fault is one: a logger of its own shows it"


AUTHORITY = st.text(st.characters(exclude_characters="/'\"<>", exclude_categories=["Cc", "Cf", "Cs", "Z"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(AUTHORITY, st.sampled_from(["http", "https", "s3", "ray", "postgres+psycopg"]), AUTHORITY)
def test_any_user_info_is_masked_at_any_position(user: str, scheme: str, before: str) -> None:
    secret = f"{user}:{SECRET}{user}"
    url = f"{scheme}://{secret}@host:80/a/path@v1?q=a@b"
    for text in (url, f"{before} {url}", f"('{url}', \"{url}\")", json.dumps({"url": url}), f"a {url}\nb {url}\x1b[0m"):
        for found in (
            mask(text),
            shown(text),
            str(MaasError(text)),
            repr(SpecError(text)),
            masked({"x": [text]})["x"][0],
        ):
            assert SECRET not in found
            assert "***@host:80/a/path@v1" in found
    error = pickle.loads(pickle.dumps(MaasError(url)))
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a@b.c",
        "s3://bucket/users@2024",
        "http://host/x@y",
        "http://host/a b@c",
        "mail me@x or http://host",
        "git@github.com:a/b",
    ],
)
def test_text_without_user_info_is_unchanged(text: str) -> None:
    assert mask(text) == shown(text) == text


def test_the_errors_of_specs_name_the_field_and_not_its_value(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"run": ENDPOINT}))
    with pytest.raises(SpecError, match=r"run: .*\*\*\*@127") as caught:
        load_spec(TrainSpec, path)
    assert SECRET not in str(caught.value)
    with pytest.raises(SpecError) as caught:
        parse_spec(StorageSpec, {"uri": "x", "endpoint": 5, ENDPOINT: 1})
    assert SECRET not in str(caught.value)
