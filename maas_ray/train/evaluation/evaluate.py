"""Computes metrics on held-out data, with torchmetrics. Independent of stores and processes."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from maas_ray.data.loading.rows import Batch, Rows
from maas_ray.data.loading.target_units import TargetUnits
from maas_ray.data.spec.features import TOKEN_TASKS, Features, TargetScaling
from maas_ray.train.custom.loss import IGNORED
from maas_ray.train.custom.metrics import CustomMetrics
from maas_ray.train.evaluation.class_metrics import MAX_CLASSES, ClassCounts, class_report
from maas_ray.train.loop.loss import num_valid

BATCH_ROWS = 1024
DEFAULT_THRESHOLD = 0.5
"""The probability from which on a row is of the positive class, unless the run chooses a threshold."""
MAX_LOGITS = 1 << 24
"""Largest number of logits of one batch: a row of tokens has one per token and token id, 64 MiB for a few rows."""

_NO_POSITIONS = torch.empty(0, dtype=torch.int64)
_MAX_LOG = 700.0  # exp of a larger value overflows float64


def evaluate(
    model: nn.Module,
    columns: Sequence[np.ndarray],
    target: np.ndarray,
    *,
    task: str,
    num_classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | None = None,
    counts: ClassCounts | None = None,
    scaling: TargetScaling | None = None,
) -> dict[str, float]:
    """Evaluates a model on columns [N, …] and a target [N], as the network learns it, in memory; see `evaluate_rows`.

    In a process group every rank passes its own rows, and all ranks get the metrics of all rows.
    """
    batches = (
        Batch([torch.from_numpy(column[rows]) for column in columns], torch.from_numpy(target[rows]), _NO_POSITIONS)
        for rows in (slice(start, start + BATCH_ROWS) for start in range(0, len(target), BATCH_ROWS))
    )
    return _evaluate(model, batches, task, num_classes, loss, device, counts=counts, scaling=scaling)


def evaluate_rows(
    model: nn.Module,
    rows: Rows,
    *,
    task: str,
    num_classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | None = None,
    rank: int = 0,
    world: int = 1,
    custom: CustomMetrics | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    counts: ClassCounts | None = None,
    scaling: TargetScaling | None = None,
) -> dict[str, float]:
    """Evaluates a model in evaluation mode on every row once.

    In a process group each rank evaluates its share of the rows, and all ranks get the metrics of all rows.

    Args:
        model: encoded columns -> logits [N, K], or [N, T, V] for token tasks.
        rows: rows of one split, the same on every rank.
        task: `classification` (accuracy, f1 macro), `binary` (accuracy, f1, auroc), `regression` (mse, mae, r2) or a
            token task (accuracy, perplexity).
        num_classes: number of classes, for `classification`; number of token ids V, for token tasks.
        loss: (logits, target) -> loss of each row.
        device: device of the model.
        rank: index of this process's share of the rows.
        world: number of shares.
        custom: the user's own metrics, whose earlier rows are forgotten.
        threshold: binary: the class is 1 if its probability is at least this.
        counts: counts the classes of the rows too, if given.
        scaling: regression: the scale of the target in the rows; metrics other than `loss` are in the units of the data.

    Returns:
        Each metric by name, and `loss`, the mean per row (per counted token, for token tasks) without regularization.
    """
    own = np.arange(rank, len(rows), world, dtype=np.int64)
    if task in TOKEN_TASKS and len(own):
        length = rows.take(own[:1], own[:1]).target.shape[1]
        size = max(1, min(BATCH_ROWS, MAX_LOGITS // (length * num_classes)))
    else:
        size = BATCH_ROWS
    # The position of an evaluated row is its number, so that its masks are the same in every evaluation.
    batches = (rows.take(ids, ids) for ids in (own[start : start + size] for start in range(0, len(own), size)))
    # All ranks have parts of a sharded model: each must run as often as the one with the most rows.
    most = -(-len(rows) // world)
    num_more = -(-most // size) - -(-len(own) // size)
    first = np.zeros(1, dtype=np.int64)
    uncounted = [rows.take(first, first)] * num_more
    return _evaluate(model, batches, task, num_classes, loss, device, uncounted, custom, threshold, counts, scaling)


def _evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: str,
    num_classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | None,
    uncounted: Sequence[Batch] = (),
    custom: CustomMetrics | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    counts: ClassCounts | None = None,
    scaling: TargetScaling | None = None,
) -> dict[str, float]:
    device = device or torch.device("cpu")
    if custom is not None:
        custom.begin(device)
    metrics: _RowMetrics | _TokenMetrics | _NumberMetrics
    if task in TOKEN_TASKS:
        metrics = _TokenMetrics(device)
    elif task == "regression":
        metrics = _NumberMetrics(device, scaling)
    else:
        metrics = _RowMetrics(task, num_classes, device, threshold, None if counts is None else counts.to(device))
    units = TargetUnits(scaling).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():  # not inference_mode: FSDP2's gathered weights would be unusable in the next step
        for batch in batches:
            logits = model(*[column.to(device) for column in batch.columns])
            wanted = batch.target.to(device)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            metrics.update(logits, wanted, loss)
            if custom is not None:
                custom.update(*(units(values) for values in comparable(task, logits, wanted)))
        for batch in uncounted:
            model(*[column.to(device) for column in batch.columns])
        result = metrics.compute() | (custom.compute() if custom is not None else {})
    model.train(was_training)
    return result


class _RowMetrics:
    def __init__(
        self, task: str, num_classes: int, device: torch.device, threshold: float, counts: ClassCounts | None
    ) -> None:
        self._task, self._threshold, self._counts = task, threshold, counts
        self._area = BinaryAUROC().to(device) if task == "binary" else None
        self._metrics = _metrics(task, num_classes).to(device)
        self._loss = MeanMetric().to(device)

    def update(self, logits: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss.update(loss(logits, target))
        target = target.long()
        if self._area is None:
            self._metrics.update(logits, target)
            probabilities = logits.softmax(dim=1)
        else:
            probabilities = logits[:, 0].sigmoid()
            self._area.update(probabilities, target)
            # As the exported graph decides; torchmetrics has `>`.
            self._metrics.update((probabilities >= self._threshold).long(), target)
        if self._counts is not None:
            self._counts.update(probabilities, target)

    def compute(self) -> dict[str, float]:
        metrics = {name: float(value) for name, value in self._metrics.compute().items()}
        if self._area is not None:
            metrics["auroc"] = float(self._area.compute())
        return {**metrics, "loss": float(self._loss.compute())}


class _NumberMetrics:
    """Computes in the units in which the network learns, in float64, and converts the results to those of the data.

    In the units of the data, the r2 of numbers with a large mean loses all digits: it is a difference of squares.
    """

    def __init__(self, device: torch.device, scaling: TargetScaling | None) -> None:
        chosen = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score()}
        self._metrics = MetricCollection({name: one.set_dtype(torch.float64) for name, one in chosen.items()}).to(
            device
        )
        self._loss = MeanMetric().to(device)
        scale = 1.0 if scaling is None else scaling.scale[0]
        self._factors = {"mse": scale**2, "mae": scale}

    def update(self, logits: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss.update(loss(logits, target))
        self._metrics.update(*(values.double() for values in comparable("regression", logits, target)))

    def compute(self) -> dict[str, float]:
        found = {name: float(value) * self._factors.get(name, 1.0) for name, value in self._metrics.compute().items()}
        return {**found, "loss": float(self._loss.compute())}


class _TokenMetrics:
    """Sums over tokens in float64: millions of terms lose digits in float32."""

    def __init__(self, device: torch.device) -> None:
        self._loss, self._correct, self._tokens = (SumMetric().set_dtype(torch.float64).to(device) for _ in range(3))

    def update(self, logits: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        counted = num_valid(target)
        self._loss.update(loss(logits, target).double().sum())
        # Uncounted targets (-100) never equal the index of a logit.
        self._correct.update((logits.argmax(dim=-1) == target).sum())
        self._tokens.update(counted)

    def compute(self) -> dict[str, float]:
        loss, correct, tokens = (float(metric.compute()) for metric in (self._loss, self._correct, self._tokens))
        mean = loss / tokens if tokens else math.nan
        perplexity = math.exp(mean) if mean < _MAX_LOG else math.inf
        return {"loss": mean, "perplexity": perplexity, "accuracy": correct / tokens if tokens else math.nan}


def _metrics(task: str, num_classes: int) -> MetricCollection:
    chosen: dict[str, Metric | MetricCollection]
    if task == "classification":
        chosen = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
    else:
        chosen = {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}
    return MetricCollection(chosen)


def comparable(task: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and target as metrics take them; for tokens, those of the counted ones.

    Args:
        task: task of the data.
        logits: [N, K], or [N, T, V] for token tasks.
        target: [N], or [N, T].
    """
    if task in TOKEN_TASKS:
        counted = target != IGNORED
        return logits[counted], target[counted]
    if task == "classification":
        return logits, target
    if task == "binary":
        return torch.sigmoid(logits[:, 0]), target.long()
    return logits[:, 0].contiguous(), target


def count_classes(features: Features, threshold: float = DEFAULT_THRESHOLD) -> ClassCounts | None:
    """The counts for a classifier of rows; None for other tasks, and for very many classes."""
    if features.labels is None or len(features.labels) > MAX_CLASSES:
        return None
    return ClassCounts(len(features.labels), threshold if features.task == "binary" else None)


def report_classes(
    features: Features, counts: ClassCounts | None, num_rows: int, threshold: float = DEFAULT_THRESHOLD
) -> dict[str, Any] | None:
    """The report of `count_classes` after an evaluation of `num_rows` rows; see `class_report`."""
    if counts is None or features.labels is None:
        return None
    return class_report(counts.compute(), features.labels, num_rows, threshold if features.task == "binary" else None)
