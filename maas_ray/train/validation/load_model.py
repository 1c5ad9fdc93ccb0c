"""Loads a run's trained network with its features, and evaluates it on held-out data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from maas_ray.checkpoint.catalog import open_checkpoint
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import read_tensors
from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.raw_model import RawModel
from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.errors import DataError, ModelError, SpecError
from maas_ray.models.build import build_model
from maas_ray.store.objects import ObjectStore
from maas_ray.train.classical.net import GraphNet
from maas_ray.train.classical.state import load_fitted
from maas_ray.train.custom.metrics import build_metrics
from maas_ray.train.evaluation.evaluate import DEFAULT_THRESHOLD, count_classes, evaluate_rows, report_classes
from maas_ray.train.evaluation.predictions import show_samples
from maas_ray.train.loop.loss import Loss, build_loss
from maas_ray.train.records.checkpoint_selector import Which, choose_step
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix
from maas_ray.train.spec.metrics import MetricSpec
from maas_ray.train.state.restore import AVERAGE

Weights = Literal["ema", "raw"]
"""`ema`: the average of the weights, of `ema` in the spec or of the optimizer; `raw`: the weights."""


@dataclass(frozen=True)
class Trained:
    """A network at a committed checkpoint, in evaluation mode on the CPU."""

    run: RunRecord
    step: int
    checkpoint_digest: str
    net: nn.Module
    dataset: Dataset
    weights: Weights = "raw"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint on one split."""

    run: str
    step: int
    split: str
    num_rows: int
    metrics: dict[str, float]
    classes: dict[str, Any] | None = None
    """Metrics of each class, confusion matrix and calibration of a classifier; see `class_report`."""


def load_trained(store: ObjectStore, run: str, step: Which = None, *, weights: Weights | None = None) -> Trained:
    """Loads a run's network at a checkpoint.

    Args:
        store: the store of the run.
        run: id of the run.
        step: step of the checkpoint, `newest` or `best`; None: `checkpoint.use` of the spec.
        weights: `ema` or `raw`; None: the average if the run keeps one.

    Raises:
        NotFound: the run or the checkpoint does not exist.
        SpecError: the run keeps no average.
        ObjectCorrupt: a part is missing, truncated or altered.
        ModelError: the model's class does not match these weights.
    """
    record = Runs(store).get(run)
    dataset = open_dataset(store, record.data_digest)
    if record.spec.model.is_classical:
        fitted = load_fitted(store, run, step if isinstance(step, int) else None)  # there is only one
        net: nn.Module = GraphNet(fitted.graph, dataset.features.task, scaling=dataset.features.target_scaling)
        return Trained(record, fitted.step, fitted.digest, net.eval(), dataset)
    committed = open_checkpoint(store, checkpoints_prefix(run), choose_step(store, record, step))
    keeps_average = any(name.startswith(AVERAGE) for name in read_index(committed))
    if weights == "ema" and not keeps_average:
        raise SpecError(f"run {run!r} keeps no average of its weights (ema in its spec); use the raw weights")
    weights = weights or ("ema" if keeps_average else "raw")
    torch.manual_seed(record.spec.seed)
    features = dataset.features
    net = build_model(record.spec.model, features.row, features.num_outputs, per_token=features.is_per_token)
    try:
        net.load_state_dict(read_tensors(committed))
        if weights == "ema":  # buffers and frozen weights have no average
            net.load_state_dict(read_tensors(committed, AVERAGE), strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{record.spec.model.name} does not match the weights of run {run!r}, step {committed.meta['step']}: "
            f"{error}; use the code of the training ({record.git_commit or 'no commit recorded'})"
        ) from error
    return Trained(record, committed.meta["step"], committed.digest, net.eval(), dataset, weights)


def evaluate_trained(
    trained: Trained,
    split: str,
    device: torch.device | None = None,
    metrics: Sequence[MetricSpec] | None = None,
    *,
    threshold: float = DEFAULT_THRESHOLD,
) -> Evaluation:
    """Evaluates a loaded network on a split; the network remains on the device.

    Args:
        trained: the loaded network.
        split: name of the split.
        device: where to compute; None: the CPU.
        metrics: the user's own metrics; None: those that the run was started with.
        threshold: binary: the decision threshold.

    Raises:
        DataError: the data does not have this split.
    """
    features = trained.dataset.features
    num_rows = trained.dataset.num_rows.get(split, 0)
    if not num_rows:
        there = ", ".join(f"{name} ({rows} rows)" for name, rows in trained.dataset.num_rows.items() if rows)
        raise DataError(
            f"the data of run {trained.run.id!r} has no {split!r} split; splits: {there}; see data.split in the spec"
        )
    own = trained.run.spec.metrics if metrics is None else metrics
    counts = count_classes(features, threshold)
    found = evaluate_rows(
        RawModel(features, trained.net).to(device),
        open_rows(trained.dataset, split, seed=trained.run.spec.seed),
        task=features.task,
        num_classes=features.num_outputs,
        loss=_on(device, build_loss(trained.run.spec.objective, features.task)),
        device=device,
        custom=build_metrics(own),
        threshold=threshold,
        counts=counts,
        scaling=features.target_scaling,
    )
    classes = report_classes(features, counts, num_rows, threshold)
    return Evaluation(trained.run.id, trained.step, split, num_rows, found, classes)


def _on(device: torch.device | None, loss: Loss) -> Loss:
    return loss.to(device) if isinstance(loss, nn.Module) and device is not None else loss


def sample_trained(trained: Trained, split: str, count: int, device: torch.device) -> str:
    """Predictions of a loaded network for the first rows of a split; see `show_samples`."""
    rows = open_rows(trained.dataset, split, seed=trained.run.spec.seed)
    return show_samples(
        RawModel(trained.dataset.features, trained.net).to(device), rows, trained.dataset, count, device
    )
