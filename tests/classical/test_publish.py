"""From a classical run to a bundle and its engine, without a cluster: what is proven, kept and refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import PREFIX, load_bundle
from maas_ray.errors import GateError, NotFound, ObjectCorrupt
from maas_ray.export.onnx_export import build_signature
from maas_ray.optimize.fitted import export_fitted
from maas_ray.optimize.publish import export_run
from maas_ray.store.fsck import fsck
from maas_ray.store.manifest import list_committed, open_committed
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.classical.fit import train_classical
from maas_ray.train.classical.state import KIND, FittedState, load_fitted, save_fitted
from maas_ray.train.records.runs import Runs
from maas_ray.train.validation.evaluate_run import evaluate_run
from tests.classical.tables import TASKS, build_dataset, create_run

MODELS = dict(zip(TASKS, ("svm", "gradient_boosting", "random_forest"), strict=True))


@pytest.mark.parametrize(
    "task", ["classification", *(pytest.param(task, marks=pytest.mark.fault) for task in ("binary", "regression"))]
)
def test_a_run_is_evaluated_published_and_served_like_any_other(file_store: ObstoreStore, task: str) -> None:
    dataset = build_dataset(file_store, task)
    spec = create_run(file_store, dataset, {"name": MODELS[task]})
    progress = train_classical(spec, dataset.digest)
    assert progress.loss is not None
    assert progress.metrics.keys() >= {"loss", "r2" if task == "regression" else "accuracy"}
    metrics = evaluate_run(file_store, "r").metrics
    assert Runs(file_store).get("r").metrics == metrics
    assert metrics["r2"] > 0.3 if task == "regression" else metrics["accuracy"] > 0.88

    exported = export_run(file_store, "r")
    info = exported.info
    assert info.parity["passed"]
    assert info.parity["versions"].keys() >= {"scikit-learn", "skl2onnx", "onnxruntime"}
    assert (info.parity["num_random"] >= 128, info.parity["num_real"] >= 100) == (True, True)
    assert info.metrics == metrics
    assert info.signature == build_signature(dataset.features)
    assert (info.lineage.run, info.lineage.step) == ("r", 1)
    assert info.lineage.checkpoint_digest == load_fitted(file_store, "r").digest

    rows = dataset.read("test")
    engine = Engine(load_bundle(file_store, exported.bundle_id))
    assert engine.can_merge
    answers = engine.run({column.name: raw for column, raw in zip(dataset.features.columns, rows.columns, strict=True)})
    scores, *classes = answers.values()
    if task == "regression":
        assert np.mean((scores[:, 0] - rows.target) ** 2) == pytest.approx(metrics["mse"], rel=1e-4)
    else:
        assert np.mean(classes[0] == rows.target) == pytest.approx(metrics["accuracy"])
    assert fsck(file_store).problems == []


@pytest.fixture
def fitted(file_store: ObstoreStore) -> FittedState:
    dataset = build_dataset(file_store, "binary")
    train_classical(create_run(file_store, dataset, {"name": "decision_tree"}), dataset.digest)
    return load_fitted(file_store, "r")


def _leaf_changed(graph: bytes) -> bytes:
    model = onnx.load_from_string(graph)
    tree = next(node for node in model.graph.node if node.op_type.startswith("TreeEnsemble"))
    weights = next(attribute for attribute in tree.attribute if attribute.name == "class_weights")
    weights.floats[0] += -0.01 if weights.floats[0] > 0.5 else 0.01
    return model.SerializeToString()


def test_a_graph_that_differs_from_scikit_learn_is_not_committed(
    file_store: ObstoreStore, fitted: FittedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(fitted, graph=_leaf_changed(fitted.graph))
    monkeypatch.setattr("maas_ray.optimize.publish.load_fitted", lambda *_: wrong)
    with pytest.raises(GateError, match="output 'predicted_probability'.*scikit-learn .*must not be published"):
        export_run(file_store, "r")
    assert list_committed(file_store, PREFIX) == []


def test_preprocessing_that_differs_from_that_of_training_is_caught(
    file_store: ObstoreStore, fitted: FittedState
) -> None:
    features = build_dataset(file_store, "binary").features
    first = features.columns[0]
    shifted = first.model_copy(update={"shift": first.shift + first.scale})
    with pytest.raises(GateError, match="scikit-learn"):
        export_fitted(fitted, features.model_copy(update={"columns": (shifted, *features.columns[1:])}))


def test_a_lost_attempt_can_repeat_its_commit_but_another_model_cannot_replace_it(
    file_store: ObstoreStore, fitted: FittedState
) -> None:
    dataset = build_dataset(file_store, "binary")
    train_classical(Runs(file_store).get("r").spec, dataset.digest)
    assert load_fitted(file_store, "r").digest == fitted.digest
    with pytest.raises(ObjectCorrupt, match="differs from that of this attempt"):
        save_fitted(file_store, "r", replace(fitted, graph=_leaf_changed(fitted.graph)))


@pytest.mark.parametrize("part", ["model.onnx", "proof.arrow", "history.json"])
def test_a_damaged_result_is_refused_before_use(file_store: ObstoreStore, fitted: FittedState, part: str) -> None:
    key = open_committed(file_store, "runs/r/fitted", KIND).parts[part].key
    data = bytearray(file_store.get(key))
    data[len(data) // 2] ^= 1
    file_store.put(key, bytes(data))
    for use in (evaluate_run, export_run):
        with pytest.raises(ObjectCorrupt) as caught:
            use(file_store, "r")
        assert key in str(caught.value)


def test_only_what_exists_is_loaded(file_store: ObstoreStore) -> None:
    dataset = build_dataset(file_store, "binary")
    create_run(file_store, dataset, {"name": "svm"})
    with pytest.raises(NotFound, match="no fitted model yet; train it with --resume"):
        evaluate_run(file_store, "r")
    with pytest.raises(NotFound, match="no step 7: fitting is its one step"):
        evaluate_run(file_store, "r", step=7)
