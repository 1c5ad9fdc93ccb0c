"""Cross-validation: folds are runs of a search; the table has the mean and the spread of what the folds measured."""

from statistics import stdev
from typing import Any

import pytest

from maas_ray.errors import Conflict, SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs
from maas_ray.train.search.cross_validation import (
    CrossValidation,
    FoldResult,
    cross_validate,
    fold_rows,
    fold_search,
    summarize_folds,
)
from maas_ray.train.search.space import draw_trials
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster


def _spec(**changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "run": "w",
        "model": {"name": "decision_tree"},
        "data": {"uri": "sklearn:wine", "task": "classification", "split": {"stratify": True}},
        **changes,
    }
    return TrainSpec.model_validate(fields)


def test_every_fold_is_a_run_of_its_own_that_differs_in_its_number_alone() -> None:
    trials = draw_trials(fold_search(_spec(), 3))
    assert [trial.run for trial in trials] == ["w-fold-0", "w-fold-1", "w-fold-2"]
    assert [(trial.spec.data.split.fold.index, trial.spec.data.split.fold.of) for trial in trials] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]
    assert all(trial.spec.data.split.stratify is True for trial in trials)


def test_splits_without_folds_are_refused() -> None:
    data = {"uri": "sklearn:wine", "task": "classification"}
    with pytest.raises(SpecError, match=r"data\.split\.fold: cross-validation sets it"):
        fold_search(_spec(data={**data, "split": {"fold": {"index": 0, "of": 3}}}), 3)
    with pytest.raises(SpecError, match="column and fold cannot be combined"):
        draw_trials(fold_search(_spec(data={**data, "split": {"column": "part"}}), 3))


def test_the_table_has_mean_and_spread_of_the_finished_folds() -> None:
    folds = [
        FoldResult(0, "w-fold-0", "finished", 10, {"accuracy": 0.5, "auroc": float("nan")}),
        FoldResult(1, "w-fold-1", "finished", 11, {"accuracy": 0.7}),
        FoldResult(2, "w-fold-2", "failed", error="training_failed: no"),
    ]
    result = CrossValidation("w-fold", folds, *summarize_folds(folds))
    assert not result.is_complete
    assert result.mean == {"accuracy": pytest.approx(0.6)}
    assert result.spread == {"accuracy": pytest.approx(stdev([0.5, 0.7]))}
    columns, rows = fold_rows(result)
    assert columns == ["fold", "run", "rows", "accuracy", ""]
    assert rows[2] == (2, "w-fold-2", "", "", "training_failed: no")
    assert rows[3] == ("mean", "2 of 3 folds", 21, "0.6", "")
    assert rows[4][3] == "0.1414"


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_folds_are_trained_tested_on_every_row_once_and_resumed(
    file_store: ObstoreStore, ray_cluster: RayCluster
) -> None:
    spec = _spec(storage={"uri": file_store.uri})
    result = cross_validate(spec, 3)
    assert result.is_complete
    assert sum(one.num_rows for one in result.folds) == 178
    assert 0.7 < result.mean["accuracy"] <= 1
    assert result.spread["accuracy"] < 0.2
    with pytest.raises(Conflict, match="--resume"):
        cross_validate(spec, 3)
    again = cross_validate(spec, 3, resume=True)
    assert again == result
    assert [run.id for run in Runs(file_store).all()][::-1] == ["w-fold-0", "w-fold-1", "w-fold-2"]
