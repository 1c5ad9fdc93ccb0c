"""The target column: casting, class names, class codes. Knows no features."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.cast import decode_column, to_numbers, to_text
from maas_ray.errors import DataError


@dataclass(frozen=True)
class Target:
    """The target of all rows before it is encoded."""

    values: pa.Array
    """Class names as text, or float32."""
    missing: NDArray[np.bool_]
    """[N]; such rows are left out."""
    num_unconvertible: int


def cast_target(name: str, column: pa.ChunkedArray, task: str) -> Target:
    """Casts the target: to text for classes, to a number for regression.

    Raises:
        DataError: no row has a target, or classes that are fractions.
    """
    if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        raise DataError(f"the target {name!r} is a list per row; expected one value")
    column = decode_column(name, column)
    if pa.types.is_floating(column.type) and task != "regression":
        present = pc.if_else(pc.is_nan(column), None, column)
        if pc.any(pc.not_equal(present, pc.floor(present))).as_py():
            raise DataError(f"the target {name!r} holds fractions, which name no classes; set task: regression")
    if task == "regression":
        numbers, num_unconvertible = to_numbers(column)
        missing = np.isnan(numbers)
        values = pa.array(numbers)
    else:
        values = to_text(name, column)
        missing, num_unconvertible = np.asarray(pc.equal(values, "").to_numpy(zero_copy_only=False)), 0
    if missing.all():
        kind = "number" if task == "regression" else "class"
        raise DataError(
            f"no row of {len(missing)} has a {kind} in the target {name!r}, "
            f"{num_unconvertible} hold something that is not a number; check data.target and task"
        )
    return Target(values, missing, num_unconvertible)


def class_names(name: str, train: pa.Array, task: str) -> tuple[str, ...]:
    """The classes of the training split in the order of their codes: by number if all are whole numbers, else by text.

    Raises:
        DataError: a single class, or other than two for a binary task.
    """
    found = [str(label) for label in pc.unique(train).to_pylist()]
    if len(found) < 2:
        raise DataError(
            f"the target {name!r} has the single class {found[0]!r} in the training split; "
            f"a classifier needs at least two"
        )
    if task == "binary" and len(found) > 2:
        raise DataError(
            f"the target {name!r} has {len(found)} classes ({', '.join(sorted(found)[:10])}); "
            f"task: binary takes two, use classification"
        )
    try:
        return tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def encode_target(name: str, values: pa.Array, labels: tuple[str, ...] | None, split: str) -> NDArray[Any]:
    """Class codes as int64 [N], or the numbers themselves as float32 [N].

    Raises:
        DataError: a class that the training split does not have.
    """
    if labels is None:
        numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False).astype(np.float32)
        return numbers
    codes = pc.index_in(values, value_set=pa.array(labels, pa.string()))
    unknown = pc.unique(values.filter(pc.is_null(codes))).to_pylist()
    if unknown:
        raise DataError(
            f"the {split} split holds classes of the target {name!r} that the training split does not: "
            f"{', '.join(map(repr, unknown[:10]))}; remove or merge rare classes, or choose another split"
        )
    encoded: NDArray[Any] = codes.to_numpy(zero_copy_only=False).astype(np.int64)
    return encoded
