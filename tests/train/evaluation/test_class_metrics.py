"""Metrics per class, confusion matrix and calibration: the numbers of scikit-learn, in one process and in several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from maas_ray.data.loading.rows import Table
from maas_ray.data.spec.features import Features
from maas_ray.train.evaluation.class_metrics import MAX_MATRIX, NUM_BINS, ClassCounts, class_report
from maas_ray.train.evaluation.evaluate import count_classes, evaluate_rows, report_classes
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.spec.optim import ObjectiveSpec
from tests.support.ranks import run_ranks

LABELS = ["a", "b", "never", "rare"]


def _features(task: str, labels: list[str]) -> Features:
    column = {"kind": "tensor", "name": "x", "shape": [len(labels) if task == "classification" else 1]}
    return Features.model_validate({"columns": [column], "task": task, "target": "y", "labels": labels})


def _rows(task: str, num_rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits and classes, one of which is rare and one never predicted."""
    rng = np.random.default_rng(0)
    target = rng.choice(
        4 if task == "classification" else 2,
        num_rows,
        p=[0.5, 0.4, 0.07, 0.03][:4] if task == "classification" else [0.9, 0.1],
    )
    if task == "classification":
        logits = rng.normal(size=(num_rows, 4)) + 2 * np.eye(4)[target]
        logits[:, 2] -= 100
    else:
        logits = rng.normal(size=(num_rows, 1)) + 3 * target[:, None] - 2
    return logits.astype(np.float32), target


def _evaluate(
    task: str, threshold: float = 0.5, rank: int = 0, world: int = 1
) -> tuple[dict[str, float], dict[str, Any]]:
    features = _features(task, LABELS if task == "classification" else ["legit", "fraud"])
    logits, target = _rows(task)
    wanted = target.astype(np.int64) if task == "classification" else target.astype(np.float32)
    counts = count_classes(features, threshold)
    metrics = evaluate_rows(
        torch.nn.Identity(),
        Table([logits], wanted),
        task=task,
        num_classes=features.num_outputs,
        loss=build_loss(ObjectiveSpec(), features.task),
        rank=rank,
        world=world,
        threshold=threshold,
        counts=counts,
    )
    return metrics, report_classes(features, counts, len(target), threshold)


@pytest.mark.parametrize(("task", "threshold"), [("classification", 0.5), ("binary", 0.5), ("binary", 0.2)])
def test_scores_and_the_matrix_are_those_of_scikit_learn(task: str, threshold: float) -> None:
    logits, target = _rows(task)
    metrics, report = _evaluate(task, threshold)
    decided = (
        logits.argmax(1) if task == "classification" else (1 / (1 + np.exp(-logits[:, 0])) >= threshold).astype(int)
    )
    expected = precision_recall_fscore_support(
        target, decided, labels=range(logits.shape[1] if task == "classification" else 2), zero_division=0
    )
    found = [
        [scores[name] for scores in report["classes"].values()] for name in ("precision", "recall", "f1", "support")
    ]
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-12)
    assert report["confusion"]["rows"] == confusion_matrix(target, decided, labels=range(len(found[0]))).tolist()
    assert metrics["accuracy"] == pytest.approx((decided == target).mean(), abs=1e-6)
    if task == "binary":
        assert metrics["f1"] == pytest.approx(report["classes"]["fraud"]["f1"], abs=1e-6)
        assert (report["positive_class"], report["threshold"]) == ("fraud", threshold)


def test_the_calibration_of_two_classes_is_that_of_scikit_learn() -> None:
    logits, target = _rows("binary")
    _, report = _evaluate("binary")
    probability = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
    frequency, mean = calibration_curve(target, probability, n_bins=NUM_BINS)
    bins = [one for one in report["calibration"]["bins"] if one["rows"]]
    np.testing.assert_allclose([one["frequency"] for one in bins], frequency, atol=1e-9)
    np.testing.assert_allclose([one["probability"] for one in bins], mean, atol=1e-6)
    gaps = [one["rows"] * abs(one["frequency"] - one["probability"]) for one in bins]
    assert report["calibration"]["expected_error"] == pytest.approx(sum(gaps) / len(target))
    assert sum(one["rows"] for one in bins) == len(target)


def test_a_classifier_that_is_sure_and_wrong_is_not_calibrated() -> None:
    counts = ClassCounts(2)
    counts.update(torch.tensor([[0.0, 1.0]] * 8), torch.tensor([0] * 6 + [1] * 2))
    report = class_report(counts.compute(), ["a", "b"], 8, None)
    assert report["calibration"]["expected_error"] == pytest.approx(0.75)
    assert report["positive_class"] is None


def test_many_classes_have_no_matrix_and_very_many_no_report() -> None:
    counts = ClassCounts(MAX_MATRIX + 1)
    counts.update(torch.eye(MAX_MATRIX + 1), torch.arange(MAX_MATRIX + 1))
    report = class_report(counts.compute(), [str(i) for i in range(MAX_MATRIX + 1)], MAX_MATRIX + 1, None)
    assert report["confusion"] is None
    assert all(scores["f1"] == 1.0 for scores in report["classes"].values())
    assert count_classes(_features("classification", [str(i) for i in range(1001)])) is None


def _on_rank(rank: int, world: int) -> dict[str, Any]:
    metrics, report = _evaluate("classification", rank=rank % world, world=world)
    return {"metrics": metrics, "report": report}


@pytest.mark.fault
def test_ranks_find_together_what_one_process_finds(tmp_path: Path) -> None:
    alone = _evaluate("classification")[1]
    for found in run_ranks(_on_rank, 2, 2):  # each its own rows
        assert found["report"]["classes"] == alone["classes"]
        assert found["report"]["confusion"] == alone["confusion"]
    for found in run_ranks(_on_rank, 2, 1):  # the same rows, as ranks that share a model
        assert found["report"]["classes"] == alone["classes"]
        assert found["report"]["calibration"]["expected_error"] == pytest.approx(alone["calibration"]["expected_error"])
