"""Metrics on held-out rows: the same however rows are held or cut into batches, and per token where a target is."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maas_ray.data.loading.rows import Batch, Table
from maas_ray.train.evaluation import evaluate as evaluation
from maas_ray.train.evaluation.evaluate import evaluate, evaluate_rows
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.spec.optim import ObjectiveSpec

T, V = 3, 5


class _TokenRows:
    """Rows of token ids whose target is the token id itself, every third not counted."""

    def __init__(self, num_rows: int) -> None:
        self.token_ids = torch.from_numpy(np.random.default_rng(0).integers(0, V, (num_rows, T)))

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, ids: np.ndarray, positions: np.ndarray) -> Batch:
        token_ids = self.token_ids[torch.from_numpy(ids)]
        target = token_ids.clone()
        target[:, 2] = -100
        return Batch([token_ids], target, torch.from_numpy(positions))


def _metrics(model: nn.Module, rows: _TokenRows, **options: int) -> dict[str, float]:
    loss = build_loss(ObjectiveSpec(), "language_modeling")
    return evaluate_rows(model, rows, task="language_modeling", num_classes=V, loss=loss, **options)


class _FixedLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(1)))

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.table[token_ids]


@pytest.mark.parametrize("max_logits", [1, T * V * 4, 1 << 24])
def test_token_metrics_are_means_over_the_tokens_that_count(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    monkeypatch.setattr(evaluation, "MAX_LOGITS", max_logits)
    rows, model = _TokenRows(30), _FixedLogits()
    counted = rows.token_ids[:, :2].flatten()
    logits = model.table[counted].detach()
    mean = float(nn.functional.cross_entropy(logits, counted))
    assert _metrics(model, rows) == pytest.approx(
        {"loss": mean, "perplexity": math.exp(mean), "accuracy": float((logits.argmax(1) == counted).float().mean())}
    )


def test_shares_of_the_rows_are_evaluated_apart() -> None:
    rows, model = _TokenRows(7), _FixedLogits()
    shares = [_metrics(model, rows, rank=rank, world=2) for rank in range(2)]
    assert (4 * shares[0]["loss"] + 3 * shares[1]["loss"]) / 7 == pytest.approx(_metrics(model, rows)["loss"])


def test_a_table_and_its_columns_have_the_same_metrics() -> None:
    columns, target = [np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)], np.arange(50) % 3
    model, loss = nn.Linear(4, 3), build_loss(ObjectiveSpec(), "classification")
    options = {"task": "classification", "num_classes": 3, "loss": loss}
    metrics = evaluate_rows(model, Table(columns, target), **options)
    assert metrics == evaluate(model, columns, target, **options)
    assert set(metrics) == {"accuracy", "f1", "loss"}
