"""Exports a run to a bundle: loads a checkpoint, exports it, verifies the export, evaluates and commits it."""

from dataclasses import asdict, dataclass
from typing import Any

from maas_ray.bundle.format import BundleInfo, DecisionThreshold, Lineage, OutputUnits, save_bundle
from maas_ray.checkpoint.catalog import pin
from maas_ray.data.prepare import Dataset
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import ParitySpec, check_parity
from maas_ray.optimize.fitted import export_fitted
from maas_ray.optimize.representative import representative_sample
from maas_ray.store.objects import ObjectStore
from maas_ray.train.classical.state import load_fitted
from maas_ray.train.evaluation.evaluate import DEFAULT_THRESHOLD
from maas_ray.train.records.checkpoint_selector import Which
from maas_ray.train.records.runs import checkpoints_prefix
from maas_ray.train.validation.load_model import Trained, Weights, evaluate_trained, load_trained
from maas_ray.train.validation.threshold import choose_threshold


@dataclass(frozen=True)
class Exported:
    """A committed bundle."""

    bundle_id: str
    info: BundleInfo


def export_run(
    store: ObjectStore,
    run: str,
    step: Which = None,
    parity: ParitySpec | None = None,
    *,
    weights: Weights | None = None,
) -> Exported:
    """Exports a checkpoint of a run behind the parity gate and commits the bundle.

    The checkpoint is pinned first, so that retention never removes the source of a version. (A classical model has
    only one result, which is never removed.)

    Args:
        store: store of the run and the bundle.
        run: the run's id.
        step: step of the checkpoint, `newest` or `best`; by default `checkpoint.use` of the spec.
        parity: the gate's tolerances.
        weights: the weights to export; by default the moving average if the run has one.

    Raises:
        NotFound: no such run or checkpoint.
        SpecError: the run has no moving average.
        ObjectCorrupt: a part of the checkpoint or the data is damaged.
        GateError: the graph's outputs differ from the trained model's; nothing is committed.
    """
    trained = load_trained(store, run, step, weights=weights)
    features = trained.dataset.features
    split = _held_out(trained.dataset)
    threshold = choose_threshold(trained)
    value = DEFAULT_THRESHOLD if threshold is None else threshold.value
    if trained.run.spec.model.is_classical:
        graph, signature, report = export_fitted(load_fitted(store, run), features, parity)
    else:
        pin(store, checkpoints_prefix(run), trained.step, "exported")
        graph, signature = export(trained.net, features, value)
        parity = parity or ParitySpec()
        rows = trained.dataset.spread(split or "train", parity.num_real)
        report = check_parity(trained.net, features, graph, rows, parity, value)
    info = BundleInfo(
        signature=signature,
        task=features.task,
        labels=features.labels,
        threshold=None if threshold is None else DecisionThreshold(**asdict(threshold)),
        units=OutputUnits(**features.target_scaling.model_dump()) if features.target_scaling is not None else None,
        parity=report,
        metrics=evaluate_trained(trained, split, threshold=value).metrics if split else {},
        reader=_reader(trained),
        lineage=_lineage(trained),
    )
    tokenizer = trained.dataset.tokenizer() if features.tokens is not None else None
    sample = representative_sample(features, signature)
    return Exported(save_bundle(store, info, graph, sample, tokenizer), info)


def _held_out(dataset: Dataset) -> str | None:
    """The held-out split; None if nothing was held out."""
    return next((name for name in ("test", "validation") if dataset.num_rows.get(name)), None)


def _reader(trained: Trained) -> dict[str, Any]:
    """The options with which the text of the training data was read."""
    spec, features = trained.run.spec.data, trained.dataset.features
    reader: dict[str, Any] = spec.reader.model_dump(mode="json")
    dates = {
        column.name: spec.cleaning.columns[column.name].model_dump(mode="json", include={"cast", "date_format"})
        for column in features.columns
        if column.kind == "date" and column.name in spec.cleaning.columns
    }
    return {**reader, "cleaning": {"columns": dates}} if dates else reader


def _lineage(trained: Trained) -> Lineage:
    return Lineage(
        run=trained.run.id,
        step=trained.step,
        checkpoint_digest=trained.checkpoint_digest,
        data_digest=trained.run.data_digest,
        spec_digest=trained.run.spec.digest(),
        git_commit=trained.run.git_commit,
        weights="ema" if trained.weights == "ema" else None,
    )
