"""Metrics per class and calibration of a classifier on held-out rows, as a torchmetrics metric."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

NUM_BINS = 15
MAX_CLASSES = 1000
"""Most classes with metrics of their own: a report contains a few numbers for each."""
MAX_MATRIX = 100
"""Most classes with a confusion matrix in the report."""


class ClassCounts(Metric):  # type: ignore[misc]
    """Counts predicted and true classes, and sums probabilities in bins. Sums over all processes of a group.

    Args:
        num_classes: number of classes K.
        threshold: binary: the class is 1 if its probability is at least this; None: the most probable class.
    """

    full_state_update = False
    support: Tensor
    predicted: Tensor
    correct: Tensor
    confusion: Tensor
    rows: Tensor
    probability: Tensor
    hits: Tensor

    def __init__(self, num_classes: int, threshold: float | None = None) -> None:
        super().__init__()
        self._num_classes, self._threshold = num_classes, threshold
        has_matrix = num_classes <= MAX_MATRIX
        for name in ("support", "predicted", "correct"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        size = num_classes**2 if has_matrix else 0
        self.add_state("confusion", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        for name, dtype in (("rows", torch.int64), ("probability", torch.float64), ("hits", torch.int64)):
            self.add_state(name, torch.zeros(NUM_BINS, dtype=dtype), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Adds rows.

        Args:
            probabilities: [N, K], or of class 1 [N] with a threshold.
            target: int64 class codes [N].
        """
        if self._threshold is None:
            confidence, decided = probabilities.max(dim=1)
            is_hit = decided == target
        else:
            confidence, decided = probabilities, (probabilities >= self._threshold).long()
            is_hit = target == 1
        size = self._num_classes
        self.support += torch.bincount(target, minlength=size)
        self.predicted += torch.bincount(decided, minlength=size)
        self.correct += torch.bincount(target[decided == target], minlength=size)
        if len(self.confusion):
            self.confusion += torch.bincount(target * size + decided, minlength=size * size)
        place = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        self.rows += torch.bincount(place, minlength=NUM_BINS)
        self.hits += torch.bincount(place[is_hit], minlength=NUM_BINS)
        self.probability += torch.bincount(place, weights=confidence.double(), minlength=NUM_BINS)

    def compute(self) -> dict[str, Tensor]:
        """The counts of all rows of all processes."""
        names = ("support", "predicted", "correct", "confusion", "rows", "probability", "hits")
        return {name: getattr(self, name).clone() for name in names}


def class_report(
    counts: dict[str, Tensor], labels: Sequence[str], num_rows: int, threshold: float | None
) -> dict[str, Any]:
    """The metrics of each class, the confusion matrix and the calibration, as plain JSON.

    The expected calibration error is the mean over rows of |probability - frequency| of 15 equal bins of the predicted
    probability (Guo et al. 2017, "On Calibration of Modern Neural Networks"): of the most probable class and how often
    it was right, or for two classes with a threshold of the positive class and how often it was true.

    Args:
        counts: see `ClassCounts.compute`.
        labels: names of the classes in the order of their codes.
        num_rows: evaluated rows; ranks that share a model have counted the same rows.
        threshold: binary: the decision threshold of the positive class, which is the last label.
    """
    copies = max(1, int(counts["support"].sum()) // max(1, num_rows))
    whole = {name: (value / copies if name == "probability" else value // copies) for name, value in counts.items()}
    support, predicted, correct = (whole[name].tolist() for name in ("support", "predicted", "correct"))
    size, matrix = len(labels), whole["confusion"].tolist()
    bins, gap = [], 0.0
    for place, (rows, probability, hits) in enumerate(
        zip(whole["rows"].tolist(), whole["probability"].tolist(), whole["hits"].tolist(), strict=True)
    ):
        gap += abs(probability - hits)
        mean, frequency = (probability / rows, hits / rows) if rows else (None, None)
        bounds = {"from": place / NUM_BINS, "to": (place + 1) / NUM_BINS}
        bins.append({**bounds, "rows": rows, "probability": mean, "frequency": frequency})
    return {
        "positive_class": labels[-1] if threshold is not None else None,
        "threshold": threshold,
        "classes": {
            label: _scores(*numbers) for label, *numbers in zip(labels, support, predicted, correct, strict=True)
        },
        "confusion": {"labels": list(labels), "rows": [matrix[i * size : (i + 1) * size] for i in range(size)]}
        if matrix
        else None,
        "calibration": {
            "of": "the most probable class" if threshold is None else labels[-1],
            "expected_error": gap / max(1, sum(support)),
            "bins": bins,
        },
    }


def _scores(support: int, predicted: int, correct: int) -> dict[str, float | int]:
    """Precision, recall and F1, each 0 where it is undefined, as in scikit-learn."""
    total = support + predicted
    return {
        "precision": correct / predicted if predicted else 0.0,
        "recall": correct / support if support else 0.0,
        "f1": 2 * correct / total if total else 0.0,
        "support": support,
    }
