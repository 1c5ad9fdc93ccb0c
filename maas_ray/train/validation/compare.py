"""Compares runs: newest metrics, differences of their specs, and curves. Independent of the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, read_saved
from maas_ray.errors import SpecError
from maas_ray.store.objects import ObjectStore
from maas_ray.train.classical.state import load_fitted
from maas_ray.train.records.report import read_curves
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix

MAX_RUNS = 20
Curve = list[list[float]]
"""Pairs of step and value."""


@dataclass(frozen=True)
class ComparedRun:
    """What is compared of one run."""

    run: str
    status: str
    step: int | None
    metrics: Mapping[str, float]
    """The newest training loss and validation metrics, and those of the newest evaluation of each split, such as
    `test_accuracy`."""
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class RunComparison:
    """A comparison of runs."""

    runs: list[ComparedRun]
    differences: dict[str, list[Any]]
    """By path of a spec's field, such as `optimizer.lr`: the value of each run; None where a run does not have it."""


def compare_runs(store: ObjectStore, names: Sequence[str]) -> RunComparison:
    """Compares runs of a store.

    Raises:
        SpecError: fewer than two runs, too many, or one twice.
        NotFound: a run does not exist.
        ObjectCorrupt: a part of a run is missing, truncated or altered.
    """
    if not 2 <= len(names) <= MAX_RUNS or len(set(names)) < len(names):
        raise SpecError(
            f"got {len(names)} runs ({', '.join(names[:MAX_RUNS])}); compare 2 to {MAX_RUNS} different runs"
        )
    records = [Runs(store).get(name) for name in names]
    return RunComparison([_compared(store, record) for record in records], spec_differences(records))


def spec_differences(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The fields in which the specs of runs differ, the name of the run aside, and `data digest` if the data differ."""
    flat = [_flattened(record.spec.model_dump(mode="json")) for record in records]
    paths = list(dict.fromkeys(path for one in flat for path in one))
    found = {path: [one.get(path) for one in flat] for path in paths if path != "run"}
    found["data digest"] = [record.data_digest[:12] for record in records]
    return {path: values for path, values in found.items() if any(value != values[0] for value in values)}


def draw_comparison(compared: RunComparison, names: Sequence[str]) -> bytes:
    """The curves of some metrics as a PNG, one panel per metric."""
    from io import BytesIO  # late, as in report.py

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(len(names), 1, place)
        for one in compared.runs:
            if curve := one.curves.get(name):
                steps, values = zip(*curve, strict=True)
                axes.plot(steps, values, label=one.run.replace("$", r"\$"), marker="." if len(steps) < 50 else None)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    written = BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _compared(store: ObjectStore, record: RunRecord) -> ComparedRun:
    if record.spec.model.is_classical:
        history = load_fitted(store, record.id).history if record.step is not None else []
    else:
        prefix = checkpoints_prefix(record.id)
        history = read_saved(open_checkpoint(store, prefix)).history if list_checkpoints(store, prefix) else []
    curves = read_curves(store, record, history)
    metrics = {name: curve[-1][1] for name, curve in curves.items() if curve and name != "lr"}
    for split, found in Runs(store).evaluated(record.id).items():
        metrics |= {f"{split}_{name}": value for name, value in found.items()}
    return ComparedRun(record.id, record.status, record.step, metrics, curves)


def _flattened(document: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(document, Mapping) or not document:
        return {path: document}
    return {
        inner: value
        for name, part in document.items()
        for inner, value in _flattened(part, f"{path}.{name}" if path else str(name)).items()
    }
