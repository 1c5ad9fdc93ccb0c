"""Figures on held-out data, with torchmetrics. Knows neither stores nor processes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

BATCH_ROWS = 1024


def evaluate(
    model: nn.Module,
    columns: Sequence[np.ndarray],
    target: np.ndarray,
    *,
    task: str,
    num_classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | None = None,
) -> dict[str, float]:
    """Evaluates a model in evaluation mode.

    Inside a process group every rank passes its own rows and all get the figures of all rows together.

    Args:
        model: encoded columns -> scores [N, K].
        columns: encoded columns, N rows each.
        target: class codes int64 [N], or float32 [N].
        task: `classification` (accuracy, f1 macro), `binary` (accuracy, f1, auroc) or `regression` (mse, mae, r2).
        num_classes: classes, for `classification`.
        loss: (scores, target) -> loss of each row.
        device: where the model is.

    Returns:
        Each figure by name, and `loss`, the mean per row without regularization.
    """
    device = device or torch.device("cpu")
    metrics = _metrics(task, num_classes).to(device)
    mean_loss = MeanMetric().to(device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(target), BATCH_ROWS):
            rows = slice(start, start + BATCH_ROWS)
            scores = model(*[torch.from_numpy(column[rows]).to(device) for column in columns]).float()
            wanted = torch.from_numpy(target[rows]).to(device)
            mean_loss.update(loss(scores, wanted))
            metrics.update(*_comparable(task, scores, wanted))
        figures = {name: float(value) for name, value in metrics.compute().items()}
        figures["loss"] = float(mean_loss.compute())
    model.train(was_training)
    return figures


def _metrics(task: str, num_classes: int) -> MetricCollection:
    chosen: dict[str, Metric | MetricCollection]
    if task == "classification":
        chosen = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
    elif task == "binary":
        chosen = {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score(), "auroc": BinaryAUROC()}
    else:
        chosen = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score()}
    return MetricCollection(chosen)


def _comparable(task: str, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if task == "classification":
        return scores, target
    if task == "binary":
        return torch.sigmoid(scores[:, 0]), target.long()
    return scores[:, 0].contiguous(), target
