"""The space of a search: what may vary, what is refused before anything starts, and which trials are drawn."""

import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from maas_ray.errors import SpecError
from maas_ray.spec import parse_spec
from maas_ray.train.search.space import draw_trials
from maas_ray.train.search.spec import TuneSpec, load_tune_spec
from maas_ray.train.spec.train import TrainSpec
from tests.support.root import ROOT

BASE = {
    "model": {"name": "mlp", "params": {"size": 2}},
    "data": {"uri": "sklearn:digits", "task": "classification"},
    "steps": 3,
}
LR = {"kind": "loguniform", "lower": 1e-4, "upper": 1e-1}


def _spec(search: dict[str, Any], **changes: Any) -> TuneSpec:
    return parse_spec(TuneSpec, {"name": "s", "base": BASE, "search": search, **changes})


def _fields(spec: TuneSpec) -> list[dict[str, Any]]:
    return [dict(trial.fields) for trial in draw_trials(spec)]


def test_each_kind_draws_within_its_bounds_and_all_over_them() -> None:
    axes = {
        "optimizer.lr": LR,
        "model.params.dropout": {"kind": "uniform", "lower": 0.2, "upper": 0.4},
        "seed": {"kind": "randint", "lower": 3, "upper": 6},
        "optimizer.name": {"kind": "choice", "categories": ["sgd", "adamw"]},
    }
    trials = draw_trials(_spec(axes, trials=200))
    rates = [trial.spec.optimizer.lr for trial in trials]
    assert 1e-4 <= min(rates) < 2e-4 < 5e-2 < max(rates) <= 1e-1
    assert 0.4 < sum(math.log10(rate) < -2.5 for rate in rates) / 200 < 0.6, "even in the logarithm"
    assert {trial.spec.seed for trial in trials} == {3, 4, 5}
    assert {trial.spec.optimizer.name for trial in trials} == {"sgd", "adamw"}
    dropouts = [trial.spec.model.params["dropout"] for trial in trials]
    assert 0.2 <= min(dropouts) < 0.21 < 0.39 < max(dropouts) <= 0.4
    assert all(float(f"{rate:.6g}") == rate for rate in rates), "what is shown is what is trained with"
    assert [trial.run for trial in trials[:3]] == ["s-0", "s-1", "s-2"]


def test_a_seed_draws_the_same_trials_and_more_of_them_begin_with_the_same() -> None:
    few = _fields(_spec({"optimizer.lr": LR}, trials=3))
    assert _fields(_spec({"optimizer.lr": LR}, trials=3)) == few
    assert _fields(_spec({"optimizer.lr": LR}, trials=7))[:3] == few
    assert _fields(_spec({"optimizer.lr": LR}, trials=3, seed=1)) != few
    with_another = _fields(_spec({"seed": {"kind": "randint", "lower": 0, "upper": 100}, "optimizer.lr": LR}, trials=3))
    assert [one["optimizer.lr"] for one in with_another] == [one["optimizer.lr"] for one in few]


def test_every_combination_of_the_grids_is_there_with_draws_of_its_own() -> None:
    grids = {
        "batch.global_size": {"kind": "grid_search", "values": [16, 32]},
        "model.params.size": {"kind": "grid_search", "values": [1, 2, 3]},
    }
    assert len(_fields(_spec(grids))) == 6
    drawn = _fields(_spec({**grids, "optimizer.lr": LR}, trials=2))
    pairs = [(one["batch.global_size"], one["model.params.size"]) for one in drawn]
    assert Counter(pairs) == dict.fromkeys(product((16, 32), (1, 2, 3)), 2)
    assert len({one["optimizer.lr"] for one in drawn}) == 12


def test_no_trial_is_drawn_twice() -> None:
    axis = {"kind": "choice", "categories": [1, 2, 3]}
    assert sorted(one["model.params.size"] for one in _fields(_spec({"model.params.size": axis}, trials=3))) == [
        1,
        2,
        3,
    ]
    with pytest.raises(SpecError, match="only about 3 different trials"):
        draw_trials(_spec({"model.params.size": axis}, trials=4))


@pytest.mark.parametrize(
    ("search", "changes", "says"),
    [
        ({"optimizer.lrr": LR}, {}, "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ({"optimiser.lr": LR}, {}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"model.params.sise": {"kind": "randint", "lower": 1, "upper": 3}}, {}, "did you mean 'size'"),
        ({"steps.many": LR}, {}, "'steps' is a value, not a section"),
        ({"optimizer.lr": {"kind": "uniform", "lower": -1.0, "upper": -0.5}}, {}, "trial 0 (optimizer.lr="),
        ({"epochs": {"kind": "randint", "lower": 1, "upper": 10}}, {}, "either epochs or steps"),
        ({"run": {"kind": "choice", "categories": ["a"]}}, {}, "'run' cannot be searched"),
        ({"storage.uri": {"kind": "choice", "categories": ["a"]}}, {}, "'storage.uri' cannot be searched"),
        ({"optimizer.lr": {"kind": "loguniform", "lower": 0.0, "upper": 1.0}}, {}, "greater than 0"),
        ({"optimizer.lr": {"kind": "uniform", "lower": 1.0, "upper": 1.0}}, {}, "must be below upper"),
        ({"optimizer.lr": {"kind": "normal", "lower": 1.0}}, {}, "'loguniform'"),
        ({"optimizer.lr": {**LR, "values": [1]}}, {}, "unknown key"),
        ({"seed": {"kind": "choice", "categories": []}}, {}, "at least 1 item"),
        ({}, {}, "at least 1 item"),
        ({"seed": {"kind": "grid_search", "values": [1, 2]}}, {"trials": 2}, "remove trials"),
        (
            {"seed": {"kind": "grid_search", "values": list(range(11))}, "optimizer.lr": LR},
            {"trials": 1000},
            "11000 trials",
        ),
        ({"optimizer.lr": LR}, {"metric": "validation_acuracy"}, "has no metric 'validation_acuracy'; metrics: loss"),
        ({"optimizer.lr": LR}, {"metric": "validation_accuracy", "mode": "min"}, "set mode to max"),
        ({"data.split.validation": {"kind": "choice", "categories": [0]}}, {}, "no validation split"),
        ({"optimizer.lr": LR}, {"scheduler": {"name": "asha", "grace_period": 0}}, "greater than 0"),
        ({"optimizer.lr": LR}, {"name": "../s"}, "name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(
    search: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        draw_trials(_spec(search, **changes))
    assert says in str(caught.value)


def test_a_base_is_found_beside_the_search_and_overrides_reach_into_it(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"run": "r", **BASE}))
    search = {"name": "s", "base": "train.yaml", "search": {"optimizer.lr": LR}, "trials": 9}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    spec = load_tune_spec(tmp_path / "search.yaml", ["trials=2", "base.steps=7"])
    trials = draw_trials(spec)
    assert [trial.spec.steps for trial in trials] == [7, 7]
    assert TrainSpec.model_validate(trials[1].document) == trials[1].spec, "a trial's document is a whole spec"
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({**search, "base": "missing.yaml"}))
    with pytest.raises(SpecError, match="cannot read the spec .*missing.yaml"):
        load_tune_spec(tmp_path / "search.yaml")


def test_the_example_is_a_search() -> None:
    trials = draw_trials(load_tune_spec(ROOT / "jobs" / "specs" / "digits-search.yaml"))
    assert len(trials) == 12
