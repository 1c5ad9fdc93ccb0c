"""From a committed checkpoint to a committed bundle, without a cluster: verification, pins and rejections."""

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
import torch

from maas_ray.bundle.format import PREFIX, load_bundle, load_info
from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.spec.features import Features, NumericColumn
from maas_ray.data.stored.dataset import TARGET, save_dataset
from maas_ray.errors import GateError, NotFound, ObjectCorrupt
from maas_ray.models.build import build_model
from maas_ray.optimize import publish
from maas_ray.optimize.publish import export_run
from maas_ray.serve.wire.metadata import model_metadata
from maas_ray.store.manifest import list_committed
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.evaluate_run import evaluate_run

FEATURES = Features(
    columns=(NumericColumn(name="a", shift=1.0, scale=2.0), NumericColumn(name="b", fill=0.5)),
    task="regression",
    target="y",
)


CHECKPOINTS = checkpoints_prefix("r")


@pytest.fixture
def run(file_store: ObstoreStore) -> str:
    """A run with two checkpoints of different weights, on a table whose target is a + b."""
    generator = np.random.default_rng(0)
    tables = {}
    for split, num_rows in (("train", 40), ("validation", 0), ("test", 20)):
        columns = {name: generator.normal(size=num_rows).astype(np.float32) for name in ("a", "b")}
        tables[split] = pa.table({**columns, TARGET: columns["a"] + columns["b"]})
    dataset = save_dataset(file_store, tables, FEATURES, {}, {})
    spec = TrainSpec.model_validate(
        {
            "run": "r",
            "model": {"name": "mlp", "params": {"size": 1}},
            "data": {"uri": "rows.csv", "target": "y", "task": "regression"},
            "storage": {"uri": file_store.uri},
        }
    )
    Runs(file_store).create(spec, dataset.digest, "0123abc")
    for step in (1, 2):
        torch.manual_seed(step)
        net = build_model(spec.model, FEATURES.row, FEATURES.num_outputs)
        tensors = {f"model.{name}": value for name, value in net.state_dict().items()}
        save(file_store, CHECKPOINTS, Snapshot(step, step, tensors))
    return "r"


def test_a_bundle_names_its_checkpoint_and_has_that_checkpoints_metrics(file_store: ObstoreStore, run: str) -> None:
    evaluate_run(file_store, run)  # of step 2: must not end up in the bundle of step 1
    exported = export_run(file_store, run, step=1)
    info = load_info(file_store, exported.bundle_id)
    assert (info.lineage.run, info.lineage.step, info.lineage.git_commit) == ("r", 1, "0123abc")
    assert info.lineage.checkpoint_digest == open_checkpoint(file_store, CHECKPOINTS, 1).digest
    assert info.metrics == evaluate_run(file_store, run, step=1).metrics
    assert info.metrics != evaluate_run(file_store, run, step=2).metrics
    assert info.parity["passed"]
    assert export_run(file_store, run, step=1).bundle_id == exported.bundle_id, "the same content is the same bundle"


def test_what_was_exported_is_never_dropped_by_retention(file_store: ObstoreStore, run: str) -> None:
    export_run(file_store, run, step=1)
    assert Retention(file_store, CHECKPOINTS, Keep(last=1)).apply() == []
    assert list_checkpoints(file_store, CHECKPOINTS) == [1, 2]


def test_a_graph_that_differs_from_the_module_is_not_committed(
    file_store: ObstoreStore, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = publish.export

    def perturbed(*arguments: object) -> tuple[bytes, object]:
        graph, signature = honest(*arguments)  # type: ignore[arg-type]
        model = onnx.load_from_string(graph)
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = onnx.numpy_helper.to_array(weights).copy()
        values.flat[0] += 0.01
        weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
        return model.SerializeToString(), signature

    monkeypatch.setattr(publish, "export", perturbed)
    with pytest.raises(GateError, match="prediction"):
        export_run(file_store, run)
    assert list_committed(file_store, PREFIX) == []


def test_a_damaged_checkpoint_is_refused_before_anything_is_made_of_it(file_store: ObstoreStore, run: str) -> None:
    key = next(iter(open_checkpoint(file_store, CHECKPOINTS).parts.values())).key
    data = bytearray(file_store.get(key))
    data[-1] ^= 1
    file_store.put(key, bytes(data))
    with pytest.raises(ObjectCorrupt) as caught:
        export_run(file_store, run)
    assert key in str(caught.value)
    assert list_committed(file_store, PREFIX) == []


def test_only_what_exists_is_exported(file_store: ObstoreStore, run: str) -> None:
    with pytest.raises(NotFound, match="no run 'x' in .*; runs: r"):
        export_run(file_store, "x")
    with pytest.raises(NotFound, match="of step 3; steps: 1, 2"):
        export_run(file_store, run, step=3)


def test_the_threshold_of_the_validation_split_is_in_the_bundle_the_graph_and_the_metadata(
    file_store: ObstoreStore,
) -> None:
    generator = np.random.default_rng(0)
    features = FEATURES.model_copy(update={"task": "binary", "labels": ("legit", "fraud")})
    tables = {}
    for split in ("train", "validation", "test"):
        columns = {name: generator.normal(size=200).astype(np.float32) for name in ("a", "b")}
        target = (columns["a"] + columns["b"] + generator.normal(size=200) > 2).astype(np.float32)
        tables[split] = pa.table({**columns, TARGET: target})
    dataset = save_dataset(file_store, tables, features, {}, {})
    fields = {
        "run": "t",
        "model": {"name": "mlp", "params": {"size": 1}},
        "data": {"uri": "rows.csv", "target": "y", "task": "binary"},
        "storage": {"uri": file_store.uri},
        "objective": {"threshold": "youden"},
    }
    spec = TrainSpec.model_validate(fields)
    Runs(file_store).create(spec, dataset.digest, None)
    torch.manual_seed(0)
    tensors = {f"model.{name}": value for name, value in build_model(spec.model, features.row, 1).state_dict().items()}
    save(file_store, checkpoints_prefix("t"), Snapshot(1, 1, tensors))

    bundle = load_bundle(file_store, export_run(file_store, "t").bundle_id)
    threshold = bundle.info.threshold
    assert threshold is not None
    assert (threshold.rule, threshold.split, threshold.positive_class) == ("youden", "validation", "fraud")
    assert abs(threshold.value - 0.5) > 1e-3

    test = dataset.read("test")
    session = onnxruntime.InferenceSession(bundle.graph)
    probability, decided = session.run(None, {"a": test.columns[0], "b": test.columns[1]})
    np.testing.assert_array_equal(decided, probability[:, 0] >= threshold.value)
    assert 0 < decided.mean() < 1

    evaluation = evaluate_run(file_store, "t")
    assert evaluation.classes is not None
    assert evaluation.classes["threshold"] == threshold.value
    assert evaluation.metrics == bundle.info.metrics
    assert evaluation.metrics["accuracy"] == pytest.approx((decided == test.target).mean())

    parameters = model_metadata("m", [1], bundle.info, {}).parameters
    assert (parameters["positive_class"], parameters["threshold"]) == ("fraud", threshold.value)
