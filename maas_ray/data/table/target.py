"""Casts the target column, and derives class names and class codes from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.sources.cast import to_numbers
from maas_ray.data.sources.number_text import read_numbers
from maas_ray.data.sources.text import decode_column, to_text
from maas_ray.data.spec.features import TargetScaling
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.data.table.exact_stats import divisor, mean_and_variance, power_sums
from maas_ray.errors import DataError


@dataclass(frozen=True)
class Target:
    """The target of all rows before it is encoded."""

    values: pa.Array
    """Class names as text, or float32."""
    missing: NDArray[np.bool_]
    """[N]; rows with a missing target are dropped."""
    num_unconvertible: int
    examples: tuple[str, ...] = ()
    """The first of the unconvertible values."""


def cast_target(name: str, column: pa.ChunkedArray, task: str, reader: ReaderOptions | None = None) -> Target:
    """Casts a complete target column: to text for classes, to a number for regression.

    Raises:
        DataError: no row has a target, or classes are fractions.
    """
    target = cast_part_of_target(name, column, task, reader=reader)
    require_target(name, len(target.missing), int(target.missing.sum()), target.num_unconvertible, task)
    return target


def cast_part_of_target(
    name: str,
    column: pa.ChunkedArray,
    task: str,
    is_whole: bool | None = None,
    reader: ReaderOptions | None = None,
) -> Target:
    """Casts a chunk of the target column.

    Args:
        name: name of the column.
        column: values of the column.
        task: task of the data spec.
        is_whole: see `to_text`.
        reader: how text is read.

    Raises:
        DataError: classes are fractions, or each row contains a list.
    """
    if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        raise DataError(f"the target {name!r} is a list per row; expected one value per row")
    column = decode_column(name, column)
    if pa.types.is_floating(column.type) and task != "regression":
        present = pc.if_else(pc.is_nan(column), None, column)
        if pc.any(pc.not_equal(present, pc.floor(present))).as_py():
            raise DataError(f"the target {name!r} contains fractions, which cannot be classes; set task: regression")
    if task == "regression":
        numbers, num_unconvertible = to_numbers(column, reader, name)
        found = read_numbers(column, reader or ReaderOptions()).examples if pa.types.is_string(column.type) else ()
        return Target(pa.array(numbers), np.isnan(numbers), num_unconvertible, found)
    values = to_text(name, column, is_whole)
    return Target(values, np.asarray(pc.equal(values, "").to_numpy(zero_copy_only=False)), 0)


def require_target(name: str, num_rows: int, num_missing: int, num_unconvertible: int, task: str) -> None:
    """Rejects data without any target value.

    Raises:
        DataError: no row has a target.
    """
    if num_missing == num_rows:
        kind = "number" if task == "regression" else "class"
        raise DataError(
            f"no row of {num_rows} has a {kind} in the target {name!r}, "
            f"{num_unconvertible} rows contain a value that is not a number; check data.target and data.task"
        )


def class_names(name: str, train: pa.Array, task: str, positive: str | None = None) -> tuple[str, ...]:
    """The classes of the training split in the order of their codes: numeric if all are whole numbers, else by text.

    Args:
        name: name of the target.
        train: the target of the training split.
        task: task of the data spec.
        positive: the class that is last, for a binary task.

    Raises:
        DataError: there is a single class, or not exactly two for a binary task; or no class `positive`.
    """
    return order_classes(name, [str(label) for label in pc.unique(train).to_pylist()], task, positive)


def order_classes(name: str, found: Sequence[str], task: str, positive: str | None = None) -> tuple[str, ...]:
    """As `class_names`, from the distinct classes."""
    if len(found) < 2:
        raise DataError(
            f"the target {name!r} has the single class {found[0]!r} in the training split; "
            f"a classifier needs at least two; check data.target and data.split"
        )
    if task == "binary" and len(found) > 2:
        raise DataError(
            f"the target {name!r} has {len(found)} classes ({', '.join(sorted(found)[:10])}); "
            f"task: binary needs exactly two; set task: classification"
        )
    try:
        ordered = sorted(found, key=int)
    except ValueError:
        ordered = sorted(found)
    if positive is None:
        return tuple(ordered)
    if positive not in ordered:
        raise DataError(
            f"data.positive_class: the target {name!r} has no class {positive!r} in the training split; its classes: "
            f"{', '.join(map(repr, ordered))}"
        )
    return (*(label for label in ordered if label != positive), positive)


def scale_target(values: NDArray[np.float32], method: str) -> TargetScaling | None:
    """The scale of a numeric target.

    Args:
        values: the target of the training split [N].
        method: `data.target_scaling`.
    """
    return target_scaling(len(values), *power_sums(values), method)


def target_scaling(count: int, total: int, squares: int, method: str) -> TargetScaling | None:
    """As `scale_target`, from the number of rows and the sums of `power_sums`."""
    if method == "none":
        return None
    mean, variance = mean_and_variance(count, total, squares, 0, 0.0)
    return TargetScaling(shift=(mean,), scale=(divisor(math.sqrt(variance)),))


def encode_target(name: str, values: pa.Array, labels: tuple[str, ...] | None, split: str) -> NDArray[Any]:
    """Class codes as int64 [N], or the numbers themselves as float32 [N].

    Raises:
        DataError: a class is not in the training split.
    """
    if labels is None:
        numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False).astype(np.float32)
        return numbers
    codes = pc.index_in(values, value_set=pa.array(labels, pa.string()))
    refuse_classes(name, pc.unique(values.filter(pc.is_null(codes))).to_pylist(), split)
    encoded: NDArray[Any] = codes.to_numpy(zero_copy_only=False).astype(np.int64)
    return encoded


def refuse_classes(name: str, unknown: Sequence[str], split: str) -> None:
    """Rejects a split with classes that the training split does not contain.

    Raises:
        DataError: there is such a class.
    """
    if unknown:
        raise DataError(
            f"the {split} split contains classes of the target {name!r} that the training split does not contain: "
            f"{', '.join(map(repr, unknown[:10]))}; set data.split.stratify: true, merge rare classes with "
            "data.rare_classes, or change data.split"
        )
