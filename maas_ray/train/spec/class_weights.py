"""The weights of classes in the training loss. Independent of torch."""

import math
from collections.abc import Sequence
from typing import Literal

from maas_ray.data.spec.features import Task
from maas_ray.errors import SpecError

ClassWeights = Literal["balanced"] | dict[str, float]


def refuse_weights(class_weights: ClassWeights | None, pos_weight: float | None, task: Task) -> None:
    """Refuses weights that the task does not have.

    Raises:
        SpecError: there are no classes, or both kinds of weights are given.
    """
    if class_weights is not None and task not in ("classification", "binary"):
        raise SpecError(f"objective.class_weights needs classes, but the task is {task}; remove it")
    if pos_weight is not None and task != "binary":
        raise SpecError(
            f"objective.pos_weight is for the task binary, but the task is {task}; use objective.class_weights for "
            "several classes"
        )
    if class_weights is not None and pos_weight is not None:
        raise SpecError("objective: class_weights and pos_weight both weight the positive class; keep one of them")


def resolve_weights(
    class_weights: ClassWeights | None, labels: Sequence[str], class_rows: Sequence[int] | None
) -> list[float] | None:
    """The weight of each class in the order of the labels, or None without weights.

    `balanced`: rows / (classes * rows of the class), over the training split (King & Zeng 2001, as in scikit-learn).

    Args:
        class_weights: see `ObjectiveSpec`.
        labels: the classes.
        class_rows: training rows of each class; needed for `balanced`.

    Raises:
        SpecError: a class has no weight, a weight has no class, or all weights are 0.
    """
    if class_weights is None:
        return None
    if class_weights == "balanced":
        if class_rows is None or min(class_rows, default=0) < 1:
            raise SpecError(
                "objective.class_weights: balanced needs at least one training row of each class; give a weight for "
                "each class instead"
            )
        total = sum(class_rows)
        return [total / (len(labels) * rows) for rows in class_rows]
    unknown, missing = sorted(class_weights.keys() - set(labels)), sorted(set(labels) - class_weights.keys())
    if unknown or missing:
        what = f"has no class {unknown[0]!r}" if unknown else f"has a class {missing[0]!r} without a weight"
        raise SpecError(
            f"objective.class_weights: the data {what}; give one weight for each of {', '.join(map(repr, labels[:20]))}"
        )
    weights = [float(class_weights[label]) for label in labels]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise SpecError("objective.class_weights: weights must be finite numbers of at least 0, and not all 0")
    return weights
