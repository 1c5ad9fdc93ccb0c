"""The decision threshold of two classes: each rule against a search over all thresholds."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from maas_ray.data.spec.features import Task
from maas_ray.errors import DataError, SpecError
from maas_ray.train.spec.optim import ObjectiveSpec
from maas_ray.train.spec.threshold import choose_value, refuse_threshold

Score = Callable[[np.ndarray, np.ndarray], float]


def _rows(seed: int, num_rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = (rng.random(num_rows) < 0.15).astype(np.float32)
    probabilities = 1 / (1 + np.exp(-(rng.normal(size=num_rows) + 2 * target - 2)))
    return np.round(probabilities, 2).astype(np.float32), target  # with ties


def _specificity(target: np.ndarray, decided: np.ndarray) -> float:
    return float(recall_score(1 - target, 1 - decided))


RULES: dict[str, Score] = {
    "f1": f1_score,
    "youden": lambda target, decided: recall_score(target, decided) + _specificity(target, decided) - 1,
    "precision>=0.6": lambda target, decided: (
        recall_score(target, decided) if precision_score(target, decided, zero_division=0) >= 0.6 else -1
    ),
    "recall>=0.9": lambda target, decided: (
        precision_score(target, decided, zero_division=0) if recall_score(target, decided) >= 0.9 else -1
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_no_other_threshold_is_better(rule: str, seed: int) -> None:
    probabilities, target = _rows(seed)
    value = choose_value(rule, probabilities, target)
    best = max(RULES[rule](target, (probabilities >= one).astype(int)) for one in np.unique(probabilities))
    assert RULES[rule](target, (probabilities >= value).astype(int)) == pytest.approx(best)
    assert np.abs(probabilities - value).min() > 0.001, "between two probabilities, so that rounding changes no class"


def test_a_number_is_taken_as_it_is() -> None:
    assert choose_value(0.37, *_rows(0)) == 0.37


def test_rules_that_the_rows_do_not_allow_are_refused() -> None:
    probabilities, target = _rows(0)
    with pytest.raises(DataError, match="all 300 rows of the validation split are of one class"):
        choose_value("f1", probabilities, np.zeros_like(target))
    with pytest.raises(
        DataError, match="no threshold reaches a precision of 0.9 on the validation split; the highest is"
    ):
        choose_value("precision>=0.9", np.array([0.9, 0.5, 0.1], np.float32), np.array([0, 1, 0]))


@pytest.mark.parametrize("rule", ["f2", "precision>=1.5", "precision>0.5", 0.0, 1.0])
def test_other_rules_are_no_rules(rule: str | float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        ObjectiveSpec(threshold=rule)


@pytest.mark.parametrize(
    ("rule", "task", "has_validation", "says"),
    [
        ("f1", "classification", True, "is for the task binary"),
        ("f1", "binary", False, "chosen on the validation split, but the data has none"),
    ],
)
def test_runs_without_what_a_rule_needs_are_refused(rule: str, task: Task, has_validation: bool, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        refuse_threshold(rule, task, has_validation)
    refuse_threshold(0.3, "binary", False)
