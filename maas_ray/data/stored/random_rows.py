"""Raw rows for parity checks: sampled from given rows, or drawn from the features. Independent of models."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maas_ray.arrays import Array
from maas_ray.data.spec.features import CategoricalColumn, Column, DateColumn, Features, NumericColumn, TensorColumn

MAX_COVERED = 4096
"""Maximum number of categories of one column that are each drawn at least once."""

_EXTREME = 10.0  # in units of the column's scale: far outside the data, but still safe to compute with
_SHARE = 0.15  # fraction of each kind of special value in the second half
_INT64 = np.iinfo(np.int64)
_LEAP_DAY_S, _NEW_CENTURY_S = 1709164800.0, 4102444800.0  # 2024-02-29 and 2100-01-01


def spread_rows(columns: Sequence[Array], num_rows: int) -> list[Array]:
    """Selects at most `num_rows` rows of the columns, evenly spread over them; fewer if there are fewer."""
    chosen = spread_ids(len(columns[0]), num_rows)
    return [column[chosen] for column in columns]


def spread_ids(available: int, num_rows: int) -> NDArray[np.int64]:
    """The indices of the rows that `spread_rows` selects: int64, ascending, each in [0, available)."""
    return np.unique(np.linspace(0, available - 1, min(num_rows, available)).astype(np.int64))


def draw_rows(features: Features, num_rows: int, seed: int) -> list[Array]:
    """Draws random rows that a client could send.

    The first half is ordinary, and contains all categories of each column; with many categories it is larger than
    `num_rows`. The second half adds missing values (if the column has a fill), categories that the training split does
    not contain, and extreme numbers.

    Args:
        features: the fitted features.
        num_rows: number of rows, at least 2; more are drawn if a column has more categories than half of it.
        seed: the same seed gives the same rows.

    Returns:
        Raw columns in the order of the features, as `Dataset.read` returns them.
    """
    generator = np.random.default_rng(seed)
    num_categories = [len(column.categories) for column in features.columns if column.kind == "categorical"]
    num_ordinary = max(num_rows // 2, *(min(count, MAX_COVERED) for count in num_categories), 1)
    num_special = max(num_rows - num_rows // 2, 1)
    return [_draw(column, num_ordinary, num_special, generator) for column in features.columns]


def _draw(column: Column, num_ordinary: int, num_special: int, generator: np.random.Generator) -> Array:
    if column.kind == "categorical":
        return _draw_categories(column, num_ordinary, num_special, generator)
    if column.kind == "tokens":
        return generator.integers(0, column.vocab_size, size=(num_ordinary + num_special, column.length))
    if column.kind == "date":
        return _draw_dates(column, num_ordinary, num_special, generator)
    shape = column.shape if column.kind == "tensor" else (1,)
    if column.kind == "tensor" and column.datatype == "UINT8":
        values = generator.integers(0, 256, size=(num_ordinary + num_special, *shape), dtype=np.uint8)
        special = values[num_ordinary:]
        special[generator.random(num_special) < _SHARE] = 0
        special[generator.random(num_special) < _SHARE] = 255
        return values
    return _draw_numbers(column, shape, num_ordinary, num_special, generator)


def _draw_numbers(
    column: NumericColumn | TensorColumn,
    shape: tuple[int, ...],
    num_ordinary: int,
    num_special: int,
    generator: np.random.Generator,
) -> Array:
    shift, scale = (np.reshape(_per_element(value, shape), shape) for value in (column.shift, column.scale))
    units = generator.standard_normal((num_ordinary + num_special, *shape))
    special = units[num_ordinary:]
    special[generator.random(special.shape) < _SHARE] = _EXTREME
    special[generator.random(special.shape) < _SHARE] = -_EXTREME
    limit = float(np.finfo(np.float32).max)
    values = np.clip(shift + scale * units, -limit, limit)
    offset = column.offset if column.kind == "numeric" else None
    if offset is None:  # else far outside the data
        values[num_ordinary:][generator.random(special.shape) < _SHARE] = 0.0
    if column.fill is not None:
        values[num_ordinary:][generator.random(special.shape) < _SHARE] = np.nan
    return values.astype(np.float32) if offset is None else values + offset


def _draw_dates(column: DateColumn, num_ordinary: int, num_special: int, generator: np.random.Generator) -> Array:
    """Whole minutes in the ten years from the first date, then also leap days and turns of centuries."""
    values = column.origin + 60.0 * generator.integers(0, 10 * 365 * 1440, size=(num_ordinary + num_special, 1))
    special = values[num_ordinary:]
    special[generator.random(special.shape) < _SHARE] = _LEAP_DAY_S
    special[generator.random(special.shape) < _SHARE] = _NEW_CENTURY_S
    if column.fill is not None:
        special[generator.random(special.shape) < _SHARE] = np.nan
    return values


def _per_element(value: float | tuple[float, ...], shape: tuple[int, ...]) -> Array:
    given = np.atleast_1d(np.asarray(value, np.float64))
    return given if len(given) > 1 else np.full(shape, given[0])


def _draw_categories(
    column: CategoricalColumn, num_ordinary: int, num_special: int, generator: np.random.Generator
) -> Array:
    known = np.array(column.categories, object if column.datatype == "BYTES" else np.int64)
    order = generator.permutation(len(known))
    ordinary = known[order[np.arange(num_ordinary) % len(known)]]
    special = known[generator.integers(0, len(known), num_special)]
    unknown = np.array(_unknown(column), known.dtype)
    is_unknown = generator.random(num_special) < 2 * _SHARE
    special[is_unknown] = unknown[np.arange(int(is_unknown.sum())) % len(unknown)]
    if column.datatype == "BYTES" and column.fill is not None:
        special[generator.random(num_special) < _SHARE] = ""
    return np.concatenate([ordinary, special]).reshape(-1, 1)


def _unknown(column: CategoricalColumn) -> list[str] | list[int]:
    """Values that are not categories: unusual text and near misses, or the limits of int64 and neighboring integers."""
    known = set(column.categories)
    if column.datatype == "BYTES":
        first = str(column.categories[0])
        texts = [
            "unknown",
            " ",
            "NaN",
            "\u00e9\u6f22\U0001f600",
            "x" * 1000,
            f"{first} ",
            f" {first}",
            first.swapcase(),
            "-1",
        ]
        return [text for text in texts if text not in known]
    middle = int(column.categories[0])
    numbers = [int(_INT64.min), int(_INT64.max), -1, max(middle - 1, int(_INT64.min)), min(middle + 1, int(_INT64.max))]
    return [number for number in numbers if number not in known] or [0]
