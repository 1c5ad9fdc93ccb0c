"""The final report of a run, next to its checkpoints: spec, data, machines, curves and checkpoints, as JSON and PNG.

runs/<run>/report/manifest.json                    digests
runs/<run>/report/parts-<attempt>/report.json      see `build_report`
runs/<run>/report/parts-<attempt>/report.png       the curves
runs/<run>/report-<n>/…                            the same, after the n-th extension of the run
"""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from maas_ray.checkpoint.catalog import describe
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.errors import Conflict, NotFound
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed, CommitWriter, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.train.records.class_figures import draw_calibration, draw_confusion
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix, run_prefix
from maas_ray.train.spec.metrics import LARGER_IS_BETTER, VALIDATION, best_step, metrics_of
from maas_ray.version import __version__

KIND = "report"
FORMAT = 1
JSON, PNG = "report.json", "report.png"
_PACKAGES = ("torch", "ray", "numpy", "onnx", "transformers", "scikit-learn")


@dataclass(frozen=True)
class FinalState:
    """The final state of a run, from its newest checkpoint or its fitted model."""

    step: int
    history: list[dict[str, Any]]
    layout: str | None = None
    seconds: dict[str, float] | None = None
    """Time of the ranks by phase."""


def commit_report(store: ObjectStore, run: str, ended: FinalState, nodes: list[dict[str, float]]) -> Committed:
    """Writes the report of a finished run; an existing one is kept, and each extension of the run gets its own.

    Args:
        store: the store of the run.
        run: id of the run.
        ended: final state of the run.
        nodes: resources of each node of the cluster.

    Raises:
        StoreError: the store failed after a limited number of retries.
    """
    record = Runs(store).get(run)
    extension = f"-{len(record.spec.extensions)}" if record.spec.extensions else ""
    prefix = f"{run_prefix(run)}/report{extension}"
    with suppress(NotFound):
        return open_committed(store, prefix, KIND)
    report = build_report(store, record, ended, nodes)
    writer = CommitWriter(store, prefix, KIND)
    writer.put(JSON, canonical_json(report))
    writer.put(PNG, draw(report))
    try:
        return writer.commit({"format": FORMAT, "step": ended.step})
    except Conflict:
        return open_committed(store, prefix, KIND)


def build_report(
    store: ObjectStore, run: RunRecord, ended: FinalState, nodes: list[dict[str, float]]
) -> dict[str, Any]:
    """The report as plain JSON; see `commit_report`."""
    curves = read_curves(store, run, ended.history)
    training_s = (ended.seconds or {}).get("training")
    samples = run.spec.position(ended.step)
    return {
        "run": run.id,
        "status": run.status,
        "reason": run.reason,
        "unvalidated": {str(step): why for step, why in run.unvalidated.items()},
        "step": ended.step,
        "spec": run.spec.model_dump(mode="json"),
        "spec_digest": run.spec.digest(),
        "data_digest": run.data_digest,
        "data": _data(store, run.data_digest),
        "git_commit": run.git_commit,
        "versions": {
            "maas-ray": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "host": {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "nodes": nodes,
        "layout": ended.layout,
        "curves": curves,
        "best": _best(curves),
        "classes": _classes(store, run, ended.history),
        "created_s": run.created_s,
        "seconds": ended.seconds,
        "samples": samples,
        "samples_per_s": samples / training_s if training_s else None,
        "checkpoints": [
            {
                name: about[name]
                for name in ("step", "committed_s", "num_bytes", "num_ranks", "layout", "metrics", "error")
            }
            for about in describe(store, checkpoints_prefix(run.id))
        ],
    }


def _data(store: ObjectStore, digest: str) -> dict[str, Any] | None:
    """The profile of the data; None: it was prepared without one, or is no longer stored."""
    with suppress(NotFound):
        profile = open_dataset(store, digest).profile
        return dict(profile) if profile is not None else None
    return None


def read_curves(store: ObjectStore, run: RunRecord, history: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Every metric of a run and `lr` by name, as pairs of step and value.

    Args:
        store: the store of the run.
        run: the run.
        history: the history in its newest checkpoint.
    """
    return _curves([*history, *_late(store, run, history)])


def draw(report: dict[str, Any]) -> bytes:
    """The curves as a PNG: losses, other metrics of validation, the learning rate; of a classifier also the confusion
    matrix and the calibration of the newest validation.
    """
    # Imported late, so that it does not delay training; without pyplot, which looks for a display.
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[list[float]]] = report["curves"]
    losses = [name for name in ("loss", f"{VALIDATION}loss") if name in curves]
    others = sorted(name for name in curves if name.startswith(VALIDATION) and name not in losses)
    panels = [names for names in (losses, others, ["lr"] if "lr" in curves else []) if names]
    classes = report.get("classes")
    num_panels = max(1, len(panels)) + (0 if classes is None else 2)
    figure = Figure(figsize=(8, 3 * num_panels), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report['run']}: {report['step']} steps of {report['spec']['model']['name']}")
    for place, names in enumerate(panels, start=1):
        axes = figure.add_subplot(num_panels, 1, place)
        for name in names:
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, values, label=name, marker="." if len(steps) < 50 else None)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    if classes is not None:
        draw_calibration(figure.add_subplot(num_panels, 1, num_panels - 1), classes)
        draw_confusion(figure.add_subplot(num_panels, 1, num_panels), classes)
    written = BytesIO()
    # Without the version of matplotlib, so that the same run gives the same bytes.
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def find_part(committed: Committed, name: str) -> str:
    """The location of a part of the report: a path, or the URI of an object."""
    store, key = committed.store, committed.parts[name].key
    root = getattr(store, "root", None)
    return str(root / key) if root is not None else f"{store.uri.rstrip('/')}/{key}"


def _late(store: ObjectStore, run: RunRecord, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of asynchronous validations that ended after the last checkpoint."""
    known = {entry["step"] for entry in history if "validation" in entry}
    return [
        {"step": step, "validation": {name.removeprefix(VALIDATION): value for name, value in metrics.items()}}
        for step, metrics in sorted(Runs(store).validated(run.id).items())
        if step not in known
    ]


def _classes(store: ObjectStore, run: RunRecord, history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest metrics of classes on the validation split, with their step; None: not a classifier, or no such split."""
    found = {entry["step"]: entry["classes"] for entry in history if "classes" in entry}
    found |= Runs(store).validated_classes(run.id)
    return {"step": max(found), **found[max(found)]} if found else None


def _curves(history: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Every metric and `lr`, as pairs of step and value."""
    curves: dict[str, list[list[float]]] = {}
    for entry in history:
        lr = {"lr": entry["lr"]} if entry.get("lr") is not None else {}
        for name, value in {**metrics_of(entry), **lr}.items():
            curves.setdefault(name, []).append([entry["step"], value])
    return curves


def _best(curves: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    best = {}
    for name, pairs in curves.items():
        if name != "lr":
            mode = "max" if name.removeprefix(VALIDATION) in LARGER_IS_BETTER else "min"
            step = best_step({int(step): {name: value} for step, value in pairs}, name, mode)
            best[name] = (
                {"step": step, "value": {int(at): value for at, value in pairs}[step]} if step is not None else {}
            )
    return best
