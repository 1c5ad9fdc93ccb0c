"""From a committed checkpoint to a committed bundle, without a cluster: verification, pins and rejections."""

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch

from maas_ray.bundle.format import PREFIX, load_info
from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.spec.features import Features, NumericColumn
from maas_ray.data.stored.dataset import TARGET, save_dataset
from maas_ray.errors import GateError, NotFound, ObjectCorrupt
from maas_ray.models.build import build_model
from maas_ray.optimize import publish
from maas_ray.optimize.publish import export_run
from maas_ray.store.manifest import list_committed
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.load_model import evaluate_run

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
