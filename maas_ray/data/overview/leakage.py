"""Finds features that contain the target: equal to it, or enough to know it without any other feature."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.sources.cast import CastColumn

MIN_ROWS = 20
"""With fewer rows a perfect rule is often chance."""
_MIN_ROWS_PER_VALUE = 3.0
_CORRELATION = 0.9999


def find_leak(column: CastColumn, target: pa.Array, missing: NDArray[np.bool_], task: str) -> str | None:
    """Why the column may contain the target, or None.

    Args:
        column: the cast feature.
        target: class names as text, or numbers.
        missing: [N]: whether a row has no target.
        task: `regression` or a task with classes.
    """
    rows = np.flatnonzero(~missing & ~column.missing)
    if len(rows) < MIN_ROWS or column.kind == "tensor":
        return None
    values, wanted = (one.take(pa.array(rows)) for one in (column.values, target))
    if task == "regression":
        return _of_numbers(column, values, wanted)
    classes = pc.dictionary_encode(wanted).indices.to_numpy(zero_copy_only=False)
    num_classes = int(classes.max()) + 1
    if num_classes < 2:
        return None
    if pc.all(pc.equal(values.cast(pa.string()), wanted)).as_py():
        return "equal to the target"
    codes = pc.dictionary_encode(values).indices.to_numpy(zero_copy_only=False)
    if _is_function(codes, classes):
        return "each of its values occurs with one class only"
    if column.kind != "categorical":
        order = np.argsort(values.to_numpy(zero_copy_only=False), kind="stable")
        changes = int((np.diff(classes[order]) != 0).sum())
        if changes == num_classes - 1:
            return (
                f"{changes} thresholds separate the classes" if changes > 1 else "one threshold separates the classes"
            )
    return None


def _of_numbers(column: CastColumn, values: pa.Array, wanted: pa.Array) -> str | None:
    numbers = wanted.to_numpy(zero_copy_only=False).astype(np.float64)
    if column.kind == "categorical":
        codes = pc.dictionary_encode(values).indices.to_numpy(zero_copy_only=False)
        targets = pc.dictionary_encode(wanted).indices.to_numpy(zero_copy_only=False)
        return "each of its values occurs with one target only" if _is_function(codes, targets) else None
    own = values.to_numpy(zero_copy_only=False).astype(np.float64)
    if np.array_equal(own.astype(np.float32), numbers.astype(np.float32)):
        return "equal to the target"
    if own.std() > 0 and numbers.std() > 0 and abs(_correlation(own, numbers)) > _CORRELATION:
        return "a linear function of the target"
    return None


def _is_function(values: NDArray[Any], targets: NDArray[Any]) -> bool:
    """Whether equal values have equal targets, with several rows per value and several targets."""
    num_values, num_targets = len(np.unique(values)), len(np.unique(targets))
    if num_targets < 2 or len(values) < _MIN_ROWS_PER_VALUE * num_values:
        return False
    pairs = values.astype(np.int64) * (int(targets.max()) + 1) + targets
    return len(np.unique(pairs)) == num_values


def _correlation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    a, b = ((x - x.mean()) / x.std() for x in (one, two))
    return float((a * b).mean())
