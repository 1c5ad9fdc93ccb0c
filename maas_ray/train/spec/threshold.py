"""The decision threshold of a binary classifier: the rules of the spec, and how each chooses from probabilities."""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maas_ray.data.spec.features import Task
from maas_ray.errors import DataError, SpecError

ThresholdRule = (
    Annotated[float, Field(gt=0.0, lt=1.0)]
    | Annotated[str, Field(pattern=r"^(f1|youden|(precision|recall)>=(0(\.[0-9]+)?|1(\.0+)?))$")]
)


def refuse_threshold(rule: ThresholdRule | None, task: Task, has_validation: bool = True) -> None:
    """Refuses a rule that the task or the data does not have.

    Raises:
        SpecError: the task is not binary, or the rule needs a validation split and there is none.
    """
    if rule is None:
        return
    if task != "binary":
        raise SpecError(f"objective.threshold is for the task binary, but the task is {task}; remove it")
    if isinstance(rule, str) and not has_validation:
        raise SpecError(
            f"objective.threshold: {rule} is chosen on the validation split, but the data has none; set "
            "data.split.validation, or give a number"
        )


def choose_value(rule: ThresholdRule, probabilities: NDArray[np.float32], target: NDArray[Any]) -> float:
    """The threshold that a rule chooses; a row is positive if its probability is at least the threshold.

    It is between two of the probabilities, so that rounding on another machine changes no row's class. Of equally good
    ones it is the highest.

    Args:
        rule: `f1` (highest F1), `youden` (highest recall + specificity - 1: Youden 1950), `precision>=p` (highest recall
            of those with this precision), `recall>=r` (highest precision of those with this recall), or a number.
        probabilities: of the positive class [N].
        target: 1 for the positive class, else 0, [N].

    Raises:
        DataError: the rows have a single class, or no threshold reaches the precision.
    """
    if not isinstance(rule, str):
        return float(rule)
    order = np.argsort(-probabilities.astype(np.float64), kind="stable")
    ordered, is_positive = probabilities[order].astype(np.float64), target[order] == 1
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of rows with equal probabilities
    hits = np.cumsum(is_positive)[ends].astype(np.float64)
    chosen = (ends + 1).astype(np.float64)
    num_positive, num_rows = float(hits[-1]), float(len(ordered))
    if not 0 < num_positive < num_rows:
        raise DataError(
            f"objective.threshold: {rule} needs rows of both classes, but all {len(ordered)} rows of the validation split "
            "are of one class; set data.split.stratify: true, or give a number"
        )
    precision, recall = hits / chosen, hits / num_positive
    if rule == "f1":
        score = 2 * hits / (chosen + num_positive)
    elif rule == "youden":
        score = recall - (chosen - hits) / (num_rows - num_positive)
    else:
        name, _, text = rule.partition(">=")
        first, second = (precision, recall) if name == "precision" else (recall, precision)
        if first.max() < float(text):
            raise DataError(
                f"objective.threshold: no threshold reaches a {name} of {text} on the validation split; the highest is "
                f"{first.max():.4g}; lower it, or use f1"
            )
        score = np.where(first >= float(text), second, -1.0)
    best = int(np.argmax(score))
    end = ends[best]
    below = ordered[end + 1] if end + 1 < len(ordered) else 0.0
    return float(np.float32((ordered[end] + below) / 2))
