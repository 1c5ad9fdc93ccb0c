"""Predictions for a few rows of held-out data as a Markdown table. Independent of metrics."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from maas_ray.data.loading.rows import Rows
from maas_ray.data.loading.target_units import TargetUnits
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import Dataset
from maas_ray.train.custom.loss import IGNORED

MAX_NEW_TOKENS = 32
"""Largest number of tokens that a language model appends, each with an inference of the whole row."""
_SHOWN_CLASSES = 3


def show_samples(model: nn.Module, rows: Rows, dataset: Dataset, count: int, device: torch.device) -> str:
    """Predictions of a model for the first rows of a split.

    Every rank of a group must call it, since each has a part of the model.

    Args:
        model: encoded columns -> logits, as in evaluation.
        rows: rows of the split.
        dataset: data set of the rows.
        count: largest number of rows.
        device: device of the model.

    Returns:
        A table with a line for each row: target and prediction, with probabilities of classes. A language model
        continues each row from its middle, always with the most probable token.
    """
    first = np.arange(min(count, len(rows)), dtype=np.int64)
    batch = rows.take(first, first)
    columns, target = [column.to(device) for column in batch.columns], batch.target
    features = dataset.features
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if features.task == "language_modeling":
                return _table(("text", "continuation", "predicted"), _continued(model, columns[0], dataset))
            logits = model(*columns).float().cpu()
    finally:
        model.train(was_training)
    if features.task == "masked_language_modeling":
        return _table(("hidden", "predicted"), _unmasked(logits, target, dataset))
    return _table(("target", "predicted"), _rows(logits, target, features))


def _rows(logits: Tensor, target: Tensor, features: Features) -> Iterable[Sequence[str]]:
    if features.task == "regression":
        units = TargetUnits(features.target_scaling)
        for wanted, value in zip(units(target).tolist(), units(logits)[:, 0].tolist(), strict=True):
            yield f"{wanted:.6g}", f"{value:.6g}"
        return
    labels = features.labels or ("0", "1")
    if features.task == "binary":
        positive = logits[:, :1].sigmoid()
        logits = torch.cat([1 - positive, positive], dim=1)
    else:
        logits = logits.softmax(dim=1)
    best = logits.topk(min(_SHOWN_CLASSES, logits.shape[1]))
    for wanted, values, codes in zip(target.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
        said = (f"{labels[code]} {value:.3f}" for value, code in zip(values, codes, strict=True))
        yield labels[int(wanted)], ", ".join(said)


def _continued(model: nn.Module, rows: Tensor, dataset: Dataset) -> Iterable[Sequence[str]]:
    length = rows.shape[1]
    first = length - min(length // 2, MAX_NEW_TOKENS)
    written = rows.clone()
    for place in range(first, length):  # causal: later tokens do not affect a position
        written[:, place] = model(written)[:, place - 1].argmax(dim=-1)
    decode = _decoder(dataset)
    for row, said in zip(rows.tolist(), written.tolist(), strict=True):
        yield decode(row[:first]), decode(row[first:]), decode(said[first:])


def _unmasked(logits: Tensor, target: Tensor, dataset: Dataset) -> Iterable[Sequence[str]]:
    decode = _decoder(dataset)
    for wanted, said in zip(target, logits.argmax(dim=-1), strict=True):
        counted = wanted != IGNORED
        yield (
            " · ".join(decode([code]) for code in wanted[counted].tolist()),
            " · ".join(decode([code]) for code in said[counted].tolist()),
        )


def _decoder(dataset: Dataset) -> Callable[[Sequence[int]], str]:
    from maas_ray.decoding.tokenizer import Tokenizer  # late: only rows of tokens need it

    return Tokenizer(dataset.tokenizer()).decode


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["row", *columns], ["---"] * (len(columns) + 1)
    numbered = ([str(number), *(_cell(text) for text in row)] for number, row in enumerate(rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (*lines, *numbered))


def _cell(text: str) -> str:
    """The text on one line, with characters escaped that would end a cell."""
    return "".join("↵" if sign == "\n" else f"\\{sign}" if sign in "|<`*_\\" else sign for sign in text)
