"""The work of a classical run's task: reads, fits, converts, evaluates and commits. Independent of Ray."""

from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.loading.raw_model import RawModel
from maas_ray.data.loading.target_units import scaled_target
from maas_ray.data.stored.dataset import Dataset, Split, open_dataset
from maas_ray.data.table.data_profile import data_lines
from maas_ray.store.lease import Claim
from maas_ray.store.objects import open_store
from maas_ray.train.callbacks.base import EndReason, RunContext
from maas_ray.train.callbacks.load import build_callbacks
from maas_ray.train.classical.estimator import fit_estimator
from maas_ray.train.classical.graph import build_graph
from maas_ray.train.classical.net import GraphNet
from maas_ray.train.classical.proof import Proof, choose_rows
from maas_ray.train.classical.state import STEP, FittedState, save_fitted
from maas_ray.train.evaluation.class_metrics import ClassCounts
from maas_ray.train.evaluation.evaluate import count_classes, evaluate, report_classes
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.loop.progress import Progress
from maas_ray.train.records.training_log import TrainingLog
from maas_ray.train.spec.optim import ObjectiveSpec
from maas_ray.train.spec.train import TrainSpec

_CHUNK_ROWS = 65_536


def train_classical(spec: TrainSpec, data_digest: str, claim: Claim | None = None) -> Progress:
    """Trains a classical run to its end and commits the result; the same spec and data give the same bytes.

    Args:
        spec: the run, with an absolute store.
        data_digest: the prepared data set.
        claim: the lease under which the result is committed.

    Returns:
        The metrics: the loss on the training split, and those of the validation split, if any.

    Raises:
        DataError, ModelError, SpecError: the data or the model is invalid.
        StoreError: the store failed; nothing is committed.
        Conflict: another process has taken over the run; nothing is committed.
    """
    num_threads = spec.workers.cpus
    torch.set_num_threads(num_threads)
    store = open_store(spec.storage)
    dataset = open_dataset(store, data_digest)
    preprocess = Preprocess(dataset.features)
    train = dataset.read("train")
    rows = _preprocessed(preprocess, dataset, train.columns)
    task = dataset.features.task
    fitted = fit_estimator(
        spec.model,
        task,
        rows,
        train.target,
        seed=spec.seed,
        num_threads=num_threads,
        weight=train.weight,
        scaling=dataset.features.target_scaling,
    )
    graph = build_graph(fitted, rows.shape[1])
    columns, num_real = choose_rows(dataset)
    scores, classes = fitted.answer(_preprocessed(preprocess, dataset, columns))
    net = GraphNet(graph, task, num_threads, dataset.features.target_scaling)
    num_validation, counts = dataset.num_rows.get("validation", 0), count_classes(dataset.features)
    progress = Progress(
        step=STEP,
        total_steps=STEP,
        epoch=1.0,
        loss=_metrics(dataset, net, train)["loss"],
        metrics=_metrics(dataset, net, dataset.read("validation"), counts) if num_validation else {},
        classes=report_classes(dataset.features, counts, num_validation) if num_validation else None,
    )
    logged, callbacks = TrainingLog(), build_callbacks(spec.callbacks)
    reason: EndReason = "failed"
    try:
        callbacks.on_begin(RunContext(spec, store, 0, data=data_lines(dataset.profile, dataset.report)))
        logged.add(progress)
        callbacks.on_step(progress)
        if progress.metrics:
            callbacks.on_validation(progress)
        proof = Proof(columns, num_real, scores, classes)
        versions = {name: version(name) for name in ("scikit-learn", "skl2onnx")}
        if claim is not None:
            claim.check(store)
        save_fitted(store, spec.run, FittedState(graph, proof, logged.entries, versions))
        reason = "finished"
    finally:
        callbacks.on_end(reason)
    return progress


def _preprocessed(preprocess: Preprocess, dataset: Dataset, columns: list[NDArray[np.generic]]) -> NDArray[np.float32]:
    """Converts raw columns to float32 [N, width], the same as for networks of other models."""
    encoded = [torch.from_numpy(column) for column in encode_columns(dataset.features, columns)]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(encoded[0]), _CHUNK_ROWS):
            part = preprocess(*(column[start : start + _CHUNK_ROWS] for column in encoded))
            parts.append(part.flatten(1).numpy())
    return np.concatenate(parts)


def _metrics(dataset: Dataset, net: GraphNet, rows: Split, counts: ClassCounts | None = None) -> dict[str, float]:
    features = dataset.features
    return evaluate(
        RawModel(features, net),
        encode_columns(features, rows.columns),
        scaled_target(features.target_scaling, rows.target),
        task=features.task,
        num_classes=features.num_outputs,
        loss=build_loss(ObjectiveSpec(), features.task),
        counts=counts,
        scaling=features.target_scaling,
    )
