"""k-fold cross-validation: a search over the number of the fold, whose test splits contain every row once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from maas_ray.errors import SpecError
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store
from maas_ray.train.search.log import MetricValue, TrialEnded
from maas_ray.train.search.run import run_search
from maas_ray.train.search.spec import TuneSpec
from maas_ray.train.spec.train import TrainSpec

_FOLD = "data.split.fold.index"


@dataclass(frozen=True)
class FoldResult:
    """One fold."""

    fold: int
    run: str
    status: str
    """`finished`, `failed`, or `waiting`: not ended, resume the cross-validation."""
    num_rows: int = 0
    """Rows of the fold's test split."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the test split."""
    error: str | None = None


@dataclass(frozen=True)
class CrossValidation:
    """The result of a cross-validation."""

    name: str
    folds: list[FoldResult]
    mean: Mapping[str, float]
    """The mean of each metric over the finished folds."""
    spread: Mapping[str, float]
    """The sample standard deviation of each metric over the finished folds; no value for a single fold."""

    @property
    def is_complete(self) -> bool:
        """Whether all folds have finished."""
        return all(one.status == "finished" for one in self.folds)


def fold_search(spec: TrainSpec, folds: int) -> TuneSpec:
    """The search whose trials are the folds: the runs `<run>-fold-0` and so on.

    Raises:
        SpecError: the split of the spec has no folds, or there are too many.
    """
    if spec.data.split.fold is not None:
        raise SpecError("data.split.fold: cross-validation sets it; remove it from the spec")
    document = spec.model_dump(mode="json", exclude_unset=True)
    document.setdefault("data", {}).setdefault("split", {})["fold"] = {"index": 0, "of": folds}
    document.pop("run", None)
    has_validation = spec.data.split.validation > 0
    return parse_spec(
        TuneSpec,
        {
            "name": f"{spec.run}-fold",
            "base": document,
            "search": {_FOLD: {"kind": "grid_search", "values": list(range(folds))}},
            "metric": "validation_loss" if has_validation else "loss",
        },
        source="cross-validation",
    )


def cross_validate(
    spec: TrainSpec,
    folds: int,
    *,
    resume: bool = False,
    on_event: Callable[[int, MetricValue | TrialEnded], None] | None = None,
) -> CrossValidation:
    """Trains one run per fold and evaluates each on its test split. Needs a connected Ray (`ray.init`).

    Args:
        spec: the run; its split decides whether folds are stratified, grouped or in order.
        folds: number of folds.
        resume: continue an existing cross-validation: finished folds do not run again, failed ones are retried.
        on_event: called with the number of a fold and each of its metrics, and its end.

    Raises:
        SpecError: the split of the spec has no folds.
        Conflict: the cross-validation exists and `resume` is False, or another process runs it.
        NotFound: `resume` is True and it does not exist.
    """
    search = fold_search(spec, folds)
    result = run_search(search, resume=resume, on_event=on_event)
    from maas_ray.train.validation.evaluate_run import evaluate_run  # late: imports torchmetrics

    store = open_store(spec.storage)
    found = []
    for trial in sorted(result.trials, key=lambda one: one.trial):
        if trial.status != "finished":
            found.append(FoldResult(trial.trial, trial.run, trial.status, error=trial.error))
            continue
        evaluation = evaluate_run(store, trial.run, "test")
        found.append(FoldResult(trial.trial, trial.run, trial.status, evaluation.num_rows, evaluation.metrics))
    return CrossValidation(search.name, found, *summarize_folds(found))


def summarize_folds(folds: list[FoldResult]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample standard deviation of each metric over the finished folds."""
    values: dict[str, list[float]] = {}
    for one in folds:
        for name, value in one.metrics.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
    return (
        {name: fmean(numbers) for name, numbers in values.items()},
        {name: stdev(numbers) for name, numbers in values.items() if len(numbers) > 1},
    )


def fold_rows(result: CrossValidation) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The columns and the rows of one table: folds, then mean and spread."""
    names = sorted(result.mean)

    def shown(metrics: Mapping[str, float]) -> list[str]:
        return [f"{metrics[name]:.4g}" if name in metrics else "" for name in names]

    rows: list[tuple[Any, ...]] = [
        (one.fold, one.run, one.num_rows or "", *shown(one.metrics), one.error or one.status) for one in result.folds
    ]
    finished = sum(one.status == "finished" for one in result.folds)
    total = sum(one.num_rows for one in result.folds)
    rows.append(("mean", f"{finished} of {len(result.folds)} folds", total, *shown(result.mean), ""))
    rows.append(("spread", "standard deviation", "", *shown(result.spread), ""))
    return ["fold", "run", "rows", *names, ""], rows
