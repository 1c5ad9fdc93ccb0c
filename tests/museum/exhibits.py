"""One small object of each stored format: how today's code writes it, and what every version must read from it."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import BundleInfo, Lineage, load_bundle, save_bundle
from maas_ray.bundle.sample import read_sample, write_sample
from maas_ray.checkpoint.catalog import open_checkpoint, pin, pinned, read_saved, verify
from maas_ray.checkpoint.load import read_tensors
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.large.save import save_shards
from maas_ray.data.loading.open import open_rows
from maas_ray.data.prepare import prepare
from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.data.stored.dataset import PREFIX as DATASETS
from maas_ray.data.stored.dataset import TARGET, open_dataset, save_dataset
from maas_ray.errors import Conflict
from maas_ray.registry.models import Registry
from maas_ray.serve.deploy.record import latest, record
from maas_ray.serve.models.desired_state import DesiredState
from maas_ray.serve.spec.pools import ServedModelSpec
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.lease import LeaseOwner, holder_of, take
from maas_ray.store.manifest import CommitWriter, open_committed
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Sequence
from maas_ray.train.classical.proof import Proof
from maas_ray.train.classical.state import FittedState, load_fitted, save_fitted
from maas_ray.train.records.run_index import RunIndex
from maas_ray.train.records.runs import Runs
from maas_ray.train.search.log import MetricValue, SearchLog, TrialEnded
from maas_ray.train.search.spec import TuneSpec
from maas_ray.train.spec.train import TrainSpec
from tests.support.onnx_models import LINEAR, linear

Exhibit = Callable[[ObstoreStore], None]


@dataclass(frozen=True)
class Format:
    """How a format is written, and the check of a store with what was written."""

    write: Exhibit
    check: Exhibit


RUN_SPEC = {
    "run": "first",
    "model": {"name": "mlp", "params": {"size": 1}},
    "data": {"uri": "sklearn:digits", "task": "classification", "split": {"validation": 0.1, "test": 0.2}},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "epochs": 2,
    "workers": {"count": 2},
    "storage": {"uri": "s3://bucket/prefix"},
}
ROWS = np.float32([[0, 1, 2], [3, 4, 5]])


def write_manifest(store: ObstoreStore) -> None:
    writer = CommitWriter(store, "things/one", "thing")
    writer.put("a.bin", bytes(range(256)))
    writer.put("folder/b.json", b'{"b": 1}')
    writer.commit({"text": "ü", "list": [1, 2.5, None, True]})


def check_manifest(store: ObstoreStore) -> None:
    committed = open_committed(store, "things/one", "thing")
    assert committed.meta == {"text": "ü", "list": [1, 2.5, None, True]}
    assert committed.read("a.bin") == bytes(range(256))
    assert committed.read("folder/b.json") == b'{"b": 1}'


def write_log(store: ObstoreStore) -> None:
    sequence = Sequence(store, "things", clock=lambda: 1000.5)
    for number in range(10):  # the first eight are in a snapshot
        sequence.append(lambda _, number=number: {"number": number, "text": "ü"})  # type: ignore[misc]


def check_log(store: ObstoreStore) -> None:
    records = list(Sequence(store, "things").read())
    assert [(one.seq, one.time_s, dict(one.event)) for one in records] == [
        (number + 1, 1000.5, {"number": number, "text": "ü"}) for number in range(10)
    ]
    assert sum(info.key.endswith(".jsonl") for info in store.scan("things/log")) == 1, "a snapshot"


def write_lease(store: ObstoreStore) -> None:
    """As `take` records it, for an owner of another machine."""
    owner = LeaseOwner(
        type="take", owner="a" * 32, host="host", pid=7, machine="boot/1", process="5", since_s=1000.0
    ).model_dump()
    Sequence(store, "things/one/owners").append(lambda _: owner)
    Sequence(store, "things/two/owners").append(lambda _: owner)
    Sequence(store, "things/two/owners").append(lambda _: {"type": "release", "owner": "a" * 32})


def check_lease(store: ObstoreStore) -> None:
    owner = holder_of(store, "things/one")
    assert owner is not None
    assert (owner.owner, owner.host, owner.pid, owner.machine, owner.since_s) == ("a" * 32, "host", 7, "boot/1", 1000.0)
    with pytest.raises(Conflict, match="process 7 on host"):
        take(store, "things/one", "thing 'one'", waits=False)
    assert holder_of(store, "things/two") is None


def write_bundle(store: ObstoreStore) -> None:
    info = BundleInfo(
        signature=LINEAR,
        task="regression",
        parity={"passed": True, "max_abs_error": 1e-7},
        metrics={"mse": 0.5},
        lineage=Lineage(run="first", step=7, checkpoint_digest="c" * 64, data_digest="d" * 64, spec_digest="e" * 64),
    )
    bundle = save_bundle(store, info, linear(2.0), write_sample({"x": ROWS}, LINEAR))
    registry = Registry(store)
    registry.publish("model", bundle, token="a")
    registry.publish("model", bundle, token="b")
    registry.promote("model", 2)
    registry.promote("model", 1, "canary")


def check_bundle(store: ObstoreStore) -> None:
    registry = Registry(store)
    (model,) = registry.models().values()
    assert (len(model.versions), model.aliases) == (2, {"production": 2, "canary": 1})
    version = registry.resolve("model")
    assert (version.version, version.run) == (2, "first")
    bundle = load_bundle(store, version.bundle)
    assert (bundle.info.signature, bundle.info.task, bundle.info.metrics) == (LINEAR, "regression", {"mse": 0.5})
    assert bundle.info.lineage is not None
    assert (bundle.info.lineage.step, bundle.info.lineage.data_digest) == (7, "d" * 64)
    assert bundle.sample is not None
    np.testing.assert_array_equal(read_sample(bundle.sample, LINEAR)["x"], ROWS)
    np.testing.assert_array_equal(Engine(bundle).run({"x": ROWS})["y"], 2 * ROWS)


TENSORS = {
    "model.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 4,
    "model.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "model.count": torch.tensor(3),
    "optimizer.weight.exp_avg": torch.full((2, 3), 0.125),
}


def write_checkpoint(store: ObstoreStore) -> None:
    for step in (5, 10):
        history = [{"step": 5, "loss": 0.75, "lr": 0.01}, {"step": 5, "validation": {"accuracy": 0.5}}]
        save(store, "runs/first/checkpoints", Snapshot(step, step * 8, TENSORS, {"seed": 3}, history))
    pin(store, "runs/first/checkpoints", 5, "version 1 of model")


def check_checkpoint(store: ObstoreStore) -> None:
    committed = open_checkpoint(store, "runs/first/checkpoints")
    assert verify(committed) == []
    saved = read_saved(committed)
    assert (saved.step, saved.cursor, saved.meta["seed"]) == (10, 80, 3)
    assert saved.history[-1] == {"step": 5, "validation": {"accuracy": 0.5}}
    found = read_tensors(committed, "")
    assert {name: tensor.dtype for name, tensor in found.items()} == {k: v.dtype for k, v in TENSORS.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert pinned(store, "runs/first/checkpoints") == {5}


def write_run(store: ObstoreStore) -> None:
    times = iter(range(1000, 2000))
    runs = Runs(store, clock=lambda: float(next(times)))
    spec = parse_spec(TrainSpec, RUN_SPEC)
    runs.create(spec, "d" * 64, "abc", {"run": "zeroth", "step": 3})
    runs.record("first", {"type": "started", "workers": 2})
    attempt = {"type": "attempt", "number": 1, "workers": 2, "first_step": 0, "reached": 9, "committed": 8}
    runs.record("first", {**attempt, "reason": "rank 1 was lost"})
    runs.record("first", {"type": "validated", "step": 8, "metrics": {"validation_loss": 0.5}})
    runs.record("first", {"type": "unvalidated", "step": 9, "error": "no room"})
    runs.record("first", {"type": "evaluated", "split": "test", "step": 9, "metrics": {"accuracy": 0.75}})
    runs.record("first", {"type": "finished", "step": 9, "reason": None})
    runs.create(spec.model_copy(update={"run": "second"}), "d" * 64, None)
    runs.record("second", {"type": "started", "workers": 2})
    runs.record("second", {"type": "failed", "error": "store_unavailable: away"})


def check_run(store: ObstoreStore) -> None:
    run = Runs(store).get("first")
    assert (run.status, run.step, run.git_commit, run.data_digest) == ("finished", 9, "abc", "d" * 64)
    assert (run.created_s, run.start) == (1000.0, {"run": "zeroth", "step": 3})
    assert (run.spec.model.params, run.spec.optimizer.lr, run.spec.epochs) == ({"size": 1}, 0.01, 2)
    assert (run.spec.data.split.test, run.spec.workers.count, run.spec.storage.uri) == (0.2, 2, "s3://bucket/prefix")
    assert dict(run.metrics) == {"accuracy": 0.75}
    assert run.unvalidated == {9: "no room"}
    assert [(one["workers"], one["reached"], one["reason"]) for one in run.attempts] == [(2, 9, "rank 1 was lost")]
    assert Runs(store).validated("first") == {8: {"validation_loss": 0.5}}
    found, damaged = Runs(store).survey()
    assert damaged == {}
    assert [(one.id, one.status, one.error) for one in found] == [
        ("second", "failed", "store_unavailable: away"),
        ("first", "finished", None),
    ]
    assert set(RunIndex(store).read()) == {"first", "second"}


FEATURES = Features(
    columns=(
        NumericColumn(name="age", fill=3.0, shift=1.0, scale=2.0),
        CategoricalColumn(name="city", categories=("a", "ü"), fill=0),
        CategoricalColumn(name="rank", datatype="INT64", categories=(1, 2)),
        TensorColumn(name="image", datatype="UINT8", shape=(1, 2, 2)),
    ),
    task="classification",
    target="y",
    labels=("no", "yes"),
)


def _tables() -> dict[str, pa.Table]:
    tables = {}
    for split, num_rows in (("train", 4), ("validation", 0), ("test", 2)):
        field, images = tensor_field("image", np.arange(num_rows * 4, dtype=np.uint8).reshape(num_rows, 1, 2, 2))
        ages = np.float32([1.5, np.nan, 2.0, 3.0])[:num_rows]
        arrays = [ages, pa.array(["a", "ü", "", "a"][:num_rows], pa.string()), np.arange(num_rows) % 2 + 1, images]
        fields = [pa.field("age", pa.float32()), pa.field("city", pa.string()), pa.field("rank", pa.int64()), field]
        table = pa.table([pa.array(array) for array in arrays], schema=pa.schema(fields))
        tables[split] = table.append_column(TARGET, pa.array(np.arange(num_rows) % 2))
    return tables


def write_table(store: ObstoreStore) -> None:
    save_dataset(store, _tables(), FEATURES, {"rows_read": 6}, {"uri": "x"})


def write_shards(store: ObstoreStore) -> None:
    save_shards(store, _tables(), FEATURES, {"rows_read": 6}, {"uri": "x"})


def check_table(store: ObstoreStore) -> None:
    (digest,) = store.children(DATASETS)
    dataset = open_dataset(store, digest)
    assert dataset.features == FEATURES
    assert (dataset.num_rows, dataset.report) == ({"train": 4, "validation": 0, "test": 2}, {"rows_read": 6})
    split = dataset.read("train")
    age, city, rank, image = split.columns
    np.testing.assert_array_equal(age, np.float32([[1.5], [np.nan], [2.0], [3.0]]))
    assert city.reshape(-1).tolist() == ["a", "ü", "", "a"]
    assert rank.reshape(-1).tolist() == [1, 2, 1, 2]
    assert image.reshape(-1).tolist() == list(range(16))
    assert split.target.tolist() == [0, 1, 0, 1]
    rows = open_rows(dataset, "test")
    assert rows.take(np.array([1]), np.array([0])).target.tolist() == [1]


TEXT = "abracadabra, " * 8


def write_tokens(store: ObstoreStore) -> None:
    spec = {
        "uri": "text.txt",
        "task": "language_modeling",
        "split": {"validation": 0.2, "test": 0.2},
        "text": {"seq_len": 4, "tokenizer": {"kind": "characters"}},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the data set records the path
        Path("text.txt").write_text(TEXT)
        prepare(DataSpec.model_validate(spec), store)


def check_tokens(store: ObstoreStore) -> None:
    (digest,) = store.children(DATASETS)
    dataset = open_dataset(store, digest)
    assert dataset.features.tokens is not None
    assert dataset.features.tokens.vocab_size == len(set(TEXT))
    batch = open_rows(dataset, "train").take(np.array([0, 1]), np.array([0, 1]))
    characters = sorted(set(TEXT))
    seen = ["".join(characters[token] for token in row) for row in batch.columns[0].tolist()]
    assert seen == ["abra", "cada"]
    assert batch.target[0].tolist() == [characters.index(character) for character in "brac"]


def write_fitted(store: ObstoreStore) -> None:
    proof = Proof([ROWS], 1, ROWS.astype(np.float64), np.array([0, 1]))
    history = [{"step": 1, "validation": {"accuracy": 0.5}}]
    save_fitted(store, "first", FittedState(linear(2.0), proof, history, {"scikit-learn": "1.7"}))


def check_fitted(store: ObstoreStore) -> None:
    state = load_fitted(store, "first")
    assert [node.op_type for node in onnx.load_model_from_string(state.graph).graph.node] == ["Mul", "Add"]
    assert (state.versions, state.step) == ({"scikit-learn": "1.7"}, 1)
    assert state.history == [{"step": 1, "validation": {"accuracy": 0.5}}]
    assert (state.proof.num_real, state.proof.scores.tolist()) == (1, ROWS.tolist())
    assert state.proof.classes is not None
    assert state.proof.classes.reshape(-1).tolist() == [0, 1]


SEARCH = {
    "name": "one",
    "base": RUN_SPEC,
    "search": {"optimizer.lr": {"kind": "loguniform", "lower": 0.001, "upper": 0.1}},
    "trials": 2,
    "metric": "accuracy",
}
ENDED = {
    0: TrialEnded("finished", (MetricValue(5, 0.5, 0.25), MetricValue(10, 1.0, 0.75))),
    1: TrialEnded("failed", error="data_error: no rows"),
}


def write_search(store: ObstoreStore) -> None:
    log = SearchLog(store, "one")
    log.begin(parse_spec(TuneSpec, SEARCH))
    for number, ended in ENDED.items():
        log.record(number, ended)


def check_search(store: ObstoreStore) -> None:
    log = SearchLog(store, "one")
    log.resume(parse_spec(TuneSpec, SEARCH))
    assert {number: asdict(ended) for number, ended in log.ended().items()} == {
        number: asdict(ended) for number, ended in ENDED.items()
    }


POOLS = {
    "storage": {"uri": "s3://bucket/prefix"},
    "http": {"port": 8001},
    "pools": [
        {"name": name, "route_prefix": f"/{name}", "models": [{"name": "model"}], "replicas": {"min": 1, "max": 3}}
        for name in ("a", "b")
    ],
}


def write_pools(store: ObstoreStore) -> None:
    record(store, parse_spec(ServeSpec, POOLS), ["a", "b"])
    desired = DesiredState(store, "a")
    desired.load("model", ServedModelSpec(name="model", version=2), max_batch_size=8)
    desired.load("other")
    desired.unload("other")


def check_pools(store: ObstoreStore) -> None:
    spec = latest(store)
    assert spec is not None
    assert (spec.storage.uri, spec.http.port) == ("s3://bucket/prefix", 8001)
    assert [(pool.name, pool.route_prefix, pool.replicas.max) for pool in spec.pools] == [
        ("a", "/a", 3),
        ("b", "/b", 3),
    ]
    models = DesiredState(store, "a").models()
    assert {name: desired.is_load for name, desired in models.items()} == {"model": True, "other": False}
    assert models["model"].spec is not None
    assert (models["model"].spec.version, models["model"].max_batch_size) == (2, 8)


FORMATS = {
    "manifest": Format(write_manifest, check_manifest),
    "log": Format(write_log, check_log),
    "lease": Format(write_lease, check_lease),
    "bundle": Format(write_bundle, check_bundle),
    "checkpoint": Format(write_checkpoint, check_checkpoint),
    "run": Format(write_run, check_run),
    "table": Format(write_table, check_table),
    "shards": Format(write_shards, check_table),
    "tokens": Format(write_tokens, check_tokens),
    "fitted": Format(write_fitted, check_fitted),
    "search": Format(write_search, check_search),
    "pools": Format(write_pools, check_pools),
}
"""By the name of their files."""


def dump(store: ObstoreStore) -> str:
    """A store as JSON: text, or `{"hex": …}`, by key."""
    objects: dict[str, object] = {}
    for key in sorted(info.key for info in store.scan("")):
        content = store.get(key)
        try:
            objects[key] = content.decode()
        except UnicodeDecodeError:
            objects[key] = {"hex": content.hex()}
    return json.dumps(objects, ensure_ascii=False, indent=1) + "\n"


def load(store: ObstoreStore, text: str) -> None:
    """Fills a store with the output of `dump`."""
    for key, content in json.loads(text).items():
        store.create(key, content.encode() if isinstance(content, str) else bytes.fromhex(content["hex"]))
