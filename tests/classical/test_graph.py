"""A fitted estimator as a graph: the same numbers, the same labels, the same bytes."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from maas_ray.errors import DataError, ModelError
from maas_ray.models.spec import ModelSpec
from maas_ray.train.classical import graph as conversion
from maas_ray.train.classical.estimator import Fitted, fit_estimator
from maas_ray.train.classical.graph import build_graph

MODELS: dict[str, dict[str, Any]] = {
    "decision_tree": {"size": 6},
    "random_forest": {"size": 12},
    "gradient_boosting": {"size": 5},
    "svm": {},
}


def _data(task: str) -> tuple[np.ndarray, np.ndarray]:
    load = {"classification": load_digits, "binary": load_breast_cancer, "regression": load_diabetes}[task]
    rows, target = load(return_X_y=True)
    scaled = (rows - rows.mean(0)) / np.where(rows.std(0) > 0, rows.std(0), 1)
    return scaled[:600].astype(np.float32), target[:600].astype(np.float64)


def _fit(name: str, task: str, rows: np.ndarray, target: np.ndarray, **params: Any) -> Fitted:
    model = ModelSpec(name=name, params=MODELS[name] | params)
    return fit_estimator(model, task, rows, target, seed=1, num_threads=1)


def _run(graph: bytes, rows: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {"x": rows})
    return outputs


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_computes_the_same_as_scikit_learn(name: str, task: str) -> None:
    rows, target = _data(task)
    fitted = _fit(name, task, rows[::2], target[::2])
    graph = build_graph(fitted, rows.shape[1])
    wild = np.random.default_rng(0).normal(scale=5, size=(200, rows.shape[1])).astype(np.float32)
    asked = np.concatenate([rows, wild])
    scores, classes = fitted.answer(asked)
    got, *labels = _run(graph, asked)
    unit = 1.0 if classes is not None else np.sqrt(np.mean(scores**2))
    assert got.dtype == np.float32
    assert got.shape == scores.shape
    assert np.abs(got - scores).max() < 1e-5 * unit
    if classes is not None:
        assert labels[0].dtype == np.int64
        assert (labels[0] == classes).all()
    if task == "binary":
        again = build_graph(_fit(name, task, rows[::2], target[::2]), rows.shape[1])
        assert again == graph, "the same run gives the same bytes"


def test_equal_votes_go_to_the_first_class_as_in_scikit_learn() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    target = (np.random.default_rng(1).random(300) < 0.5).astype(np.float64)  # noise: the trees disagree
    fitted = _fit("random_forest", "binary", rows, target, size=100, max_depth=None)
    asked = np.random.default_rng(2).normal(size=(2000, 3)).astype(np.float32)
    probability, classes = fitted.answer(asked)
    got, labels = _run(build_graph(fitted, 3), asked)
    ties = probability[:, 0] == 0.5
    assert ties.sum() > 10
    assert (got[ties, 0] > 0.5).any(), "sums in float32 alone would decide some of them for the second class"
    assert (labels == classes).all()


def test_a_threshold_between_neighbouring_floats_parts_them_in_the_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    up = np.float32(np.inf)
    below = np.nextafter(np.arange(1, 100, dtype=np.float32), up)  # odd, so that the middle rounds to the one above
    rows = np.concatenate([below, np.nextafter(below, up)]).reshape(-1, 1)
    target = np.arange(len(rows)) // len(below) * 1000.0 + rows[:, 0]
    fitted = _fit("gradient_boosting", "regression", rows, target, size=3, min_samples_leaf=1, max_leaf_nodes=None)
    expected = fitted.answer(rows)[0]

    def error() -> float:
        return float(np.abs(_run(build_graph(fitted, 1), rows)[0] - expected).max())

    assert error() < 1e-2
    monkeypatch.setattr(conversion.np, "nextafter", lambda near, _: near)  # as skl2onnx rounds
    assert error() > 1


def test_a_regression_does_not_depend_on_the_unit_of_the_target() -> None:
    rows, target = _data("regression")
    for unit, shift in ((1.0, 0.0), (1000.0, 5e5)):
        predicted = _fit("svm", "regression", rows, target * unit + shift).answer(rows)[0]
        assert np.corrcoef(predicted[:, 0], target)[0, 1] > 0.7


def test_what_cannot_be_fitted_or_held_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, target = _data("classification")
    target[:] = np.arange(len(target)) > 0
    with pytest.raises(DataError, match="svm calibrates .* a class has 1 row"):
        _fit("svm", "binary", rows, target)
    monkeypatch.setattr(conversion, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(ModelError, match="the limit is 1000; limit its trees by max_depth"):
        build_graph(_fit("random_forest", "binary", rows, target), rows.shape[1])
