"""Chooses the decision threshold of a trained binary classifier on its validation split."""

from dataclasses import dataclass

import numpy as np
import torch

from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.raw_model import RawModel
from maas_ray.train.evaluation.evaluate import BATCH_ROWS
from maas_ray.train.spec.threshold import choose_value
from maas_ray.train.validation.load_model import Trained


@dataclass(frozen=True)
class ChosenThreshold:
    """A decision threshold and its origin."""

    value: float
    positive_class: str
    rule: str
    """`objective.threshold` of the spec."""
    split: str | None
    """The split on which the value was chosen; None: it is the number in the spec."""


def choose_threshold(trained: Trained, device: torch.device | None = None) -> ChosenThreshold | None:
    """The decision threshold of a checkpoint, by the rule of its run; None without a rule.

    The same checkpoint and data give the same threshold, so that `evaluate` and `publish` agree.

    Args:
        trained: the loaded network.
        device: where to compute; None: the CPU.

    Raises:
        DataError: the validation split does not allow the rule; see `choose_value`.
    """
    rule, features = trained.run.spec.objective.threshold, trained.dataset.features
    if rule is None or features.labels is None:
        return None
    positive = features.labels[-1]
    if not isinstance(rule, str):
        return ChosenThreshold(rule, positive, str(rule), None)
    device = device or torch.device("cpu")
    model = RawModel(features, trained.net).to(device).eval()
    rows = open_rows(trained.dataset, "validation", seed=trained.run.spec.seed)
    probabilities, targets = [], []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH_ROWS):
            ids = np.arange(start, min(start + BATCH_ROWS, len(rows)), dtype=np.int64)
            batch = rows.take(ids, ids)
            logits = model(*[column.to(device) for column in batch.columns])
            probabilities.append(logits[:, 0].float().sigmoid().cpu().numpy())
            targets.append(batch.target.numpy())
    value = choose_value(rule, np.concatenate(probabilities), np.concatenate(targets))
    return ChosenThreshold(value, positive, rule, "validation")
