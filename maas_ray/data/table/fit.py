"""Fits the description of each column (`spec/features.py`) to the training split's statistics."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from maas_ray.data.sources.wide import Narrowing
from maas_ray.data.spec.cleaning import CleaningSpec
from maas_ray.data.spec.features import CategoricalColumn, Column, DateColumn, NumericColumn, TensorColumn
from maas_ray.data.table import exact_stats
from maas_ray.data.table.column_statistics import CPU_TIMEOUT_S, Statistics, gather_statistics
from maas_ray.data.table.plan import ColumnPlan
from maas_ray.data.table.refusals import Refusals
from maas_ray.errors import DataError

_FEW_CATEGORIES = 20
"""Columns with at most as many categories are never identifiers."""


def fit_columns(
    train: pa.Table,
    plans: Sequence[ColumnPlan],
    cleaning: CleaningSpec,
    block_rows: int | None = None,
    cpu_timeout_s: float = CPU_TIMEOUT_S,
) -> tuple[Column, ...]:
    """Fits fills, scales and categories.

    Args:
        train: the cast columns of the training split.
        plans: one per column, in order.
        cleaning: limits on the categories of a column.
        block_rows: see `gather_statistics`; the result does not depend on it.
        cpu_timeout_s: see `gather_statistics`.

    Raises:
        DataError: a column has no value in the training split, or too many categories.
        ClusterError: a task could not run, see `gather_statistics`.
    """
    return fit_statistics(gather_statistics(train, plans, block_rows, cpu_timeout_s), plans, cleaning)


def fit_statistics(
    gathered: Mapping[str, Statistics],
    plans: Sequence[ColumnPlan],
    cleaning: CleaningSpec,
    refusals: Refusals | None = None,
) -> tuple[Column, ...]:
    """As `fit_columns`, from the statistics of the training split.

    Args:
        gathered: statistics by column.
        plans: the columns.
        cleaning: limits of categories.
        refusals: what was refused before, to be raised with the refusals of this step.

    Raises:
        DataError: a column has no value in the training split, or too many categories.
    """
    refusals, fitted = refusals or Refusals(), []
    for plan in plans:
        with refusals.collect():
            fitted.append(_fit(plan, gathered[plan.name], cleaning))
    refusals.refuse()
    return tuple(fitted)


def _fit(plan: ColumnPlan, found: Statistics, cleaning: CleaningSpec) -> Column:
    if not found.num_present:
        raise DataError(
            f"column {plan.name!r} has no value in the training split ({found.num_missing} missing); "
            f"leave it out with cleaning.drop, or change data.split"
        )
    if plan.kind == "categorical":
        return _fit_categorical(plan, found, cleaning)
    if plan.kind == "date" and plan.narrowing is not None:
        return _fit_date(plan, found, plan.narrowing)
    fill = _fill(plan, found)
    pairs = [_scaling(plan, found, i, fill) for i in range(len(found.present))]
    shift = tuple(pair[0] for pair in pairs)
    scale = tuple(pair[1] for pair in pairs)
    if plan.kind == "numeric":
        offset = plan.narrowing.offset if plan.narrowing is not None else None
        values = {"fill": fill, "shift": shift[0], "scale": scale[0], "offset": offset, "boolean": plan.is_boolean}
        return NumericColumn(name=plan.name, **values)
    return TensorColumn(
        name=plan.name,
        datatype="UINT8" if plan.is_bytes else "FP32",
        shape=plan.shape,
        fill=None if plan.is_bytes else fill,
        shift=shift,
        scale=scale,
    )


def _fit_date(plan: ColumnPlan, found: Statistics, narrowing: Narrowing) -> DateColumn:
    pairs = [_scaling(plan, found, i, None) for i in range(len(found.present))]
    fill = None
    if plan.missing == "mean":
        sums = zip(found.present, found.sums, found.squares, strict=True)
        fill = tuple(float(np.float32(exact_stats.mean_and_variance(*one, 0, 0.0)[0])) for one in sums)
    return DateColumn(
        name=plan.name,
        encoding=narrowing.encoding or "parts",
        origin=narrowing.offset,
        fill=fill,
        shift=tuple(pair[0] for pair in pairs),
        scale=tuple(pair[1] for pair in pairs),
    )


def _whole(constant: str) -> int | None:
    """The constant as an integer; None: it is a text, which a column of integers cannot contain."""
    try:
        return int(constant)
    except ValueError:
        return None


def _fill(plan: ColumnPlan, found: Statistics) -> float | None:
    """The fill as a float32, because the graph computes in float32."""
    if plan.missing in ("error", "drop_row"):
        return None
    value: float
    if plan.missing == "mean":
        value, _ = exact_stats.mean_and_variance(sum(found.present), sum(found.sums), sum(found.squares), 0, 0.0)
    elif plan.missing == "median" and found.median is not None:
        value = found.median
    elif plan.missing == "most_frequent":
        value = min(found.counts, key=lambda one: (-found.counts[one], one))
    else:
        value = plan.constant
    return float(np.float32(value))


def _scaling(plan: ColumnPlan, found: Statistics, i: int, fill: float | None) -> tuple[float, float]:
    """Shift and scale of one series of values (an element of a vector, else all), after missing values are filled."""
    if plan.scaling == "none":
        return 0.0, 1.0
    num_series = len(found.present)
    num_filled = (found.num_present + found.num_missing) // num_series - found.present[i] if fill is not None else 0
    if plan.scaling == "standard":
        if not found.present[i] + num_filled:
            return 0.0, 1.0
        mean, variance = exact_stats.mean_and_variance(
            found.present[i], found.sums[i], found.squares[i], num_filled, fill or 0.0
        )
        return mean, exact_stats.divisor(math.sqrt(variance))
    values = [found.minima[i], found.maxima[i]] + ([fill] if num_filled else [])
    seen = [value for value in values if value is not None]
    if not seen:
        return 0.0, 1.0
    low, high = min(seen), max(seen)
    return low, exact_stats.divisor(high - low)


def _fit_categorical(plan: ColumnPlan, found: Statistics, cleaning: CleaningSpec) -> CategoricalColumn:
    categories = set(found.counts)
    fill_value = None
    if plan.missing == "most_frequent":
        fill_value = min(found.counts, key=lambda one: (-found.counts[one], one))
    elif plan.missing == "constant":
        fill_value = _whole(plan.constant) if plan.is_integer else plan.constant
        categories |= set() if fill_value is None else {fill_value}
    refuse_categories(plan.name, len(categories), cleaning.max_categories)
    _refuse_distinct(plan.name, len(found.counts), found.num_present, cleaning.max_distinct)
    ordered = tuple(sorted(categories))
    # The training data has no missing integer, but the endpoint takes a null.
    fill = None if fill_value is None else ordered.index(fill_value)
    return CategoricalColumn(
        name=plan.name,
        datatype="INT64" if plan.is_integer else "BYTES",
        categories=ordered,
        fill=fill,
        encoding=plan.encoding,
        unknown=plan.unknown,
    )


def _refuse_distinct(name: str, num_categories: int, num_rows: int, limit: float) -> None:
    if num_categories > max(_FEW_CATEGORIES, limit * num_rows):
        raise DataError(
            f"column {name!r} has {num_categories} categories in {num_rows} rows of the training split: an identifier, a "
            f"date or free text, of which most new values are unknown; leave it out with cleaning.drop, set "
            f"cleaning.columns.{name}.cast to number or date, or raise cleaning.max_distinct ({limit:g})"
        )


def refuse_categories(name: str, num_categories: int, max_categories: int) -> None:
    """Raises `DataError` for a column with too many categories."""
    if num_categories > max_categories:
        raise DataError(
            f"column {name!r} has {num_categories} categories; the limit is {max_categories}; leave it out with "
            f"cleaning.drop, cast it to number, or raise cleaning.max_categories"
        )
