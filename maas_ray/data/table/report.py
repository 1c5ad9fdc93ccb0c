"""Selects the rows to keep and counts the data set's report. The counts of blocks of rows can be added."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maas_ray.data.sources.cast import CastColumn
from maas_ray.data.sources.number_text import named, propose
from maas_ray.data.spec.data import SPLITS, DataSpec
from maas_ray.data.table.plan import ColumnPlan
from maas_ray.data.table.target import Target
from maas_ray.errors import DataError


def drop_rows(
    columns: Sequence[CastColumn], plans: Sequence[ColumnPlan], target: Target, num_rows: int
) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """The rows to keep, and the report."""
    kept = ~target.missing
    for column, plan in zip(columns, plans, strict=True):
        if plan.missing == "drop_row":
            kept &= ~column.missing
    num_without_target = int(target.missing.sum())
    counts = {
        column.field.name: {
            "missing": column.num_missing,
            "unconvertible": column.num_unconvertible,
        }
        for column in columns
    }
    report = {
        "rows_read": num_rows,
        "rows_dropped": {
            "target_missing": num_without_target,
            "value_missing": num_rows - num_without_target - int(kept.sum()),
        },
        "columns": counts,
        "target": {
            "missing": num_without_target - target.num_unconvertible,
            "unconvertible": target.num_unconvertible,
        },
    }
    return kept, report


def add_counts(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """The sums of nested counts; `one` may be empty."""
    if not one:
        return dict(two)
    return {
        name: add_counts(one[name], value) if isinstance(value, Mapping) else one[name] + value
        for name, value in two.items()
    }


def refuse_without_value(name: str, num_rows: int, num_unconvertible: int) -> None:
    """Raises `DataError` for a column without any value."""
    lost = f", {num_unconvertible} could not be converted" if num_unconvertible else ""
    raise DataError(f"column {name!r} has no value in any of {num_rows} rows{lost}; leave it out with cleaning.drop")


def refuse_missing(plan: ColumnPlan, num_missing: int, num_kept: int) -> None:
    """Rejects missing values without a policy.

    Raises:
        DataError: there are missing values without a policy.
    """
    if plan.missing == "error" and num_missing:
        raise DataError(
            f"column {plan.name!r} has {num_missing} missing values in {num_kept} rows; set "
            f"cleaning.{plan.kind}.missing or cleaning.columns.{plan.name}.missing, or leave it out "
            f"with cleaning.drop"
        )


def refuse_dropped(spec: DataSpec, report: Mapping[str, Any], examples: Sequence[str]) -> None:
    """Rejects data of which too many rows are dropped, or whose target is too often not convertible.

    Args:
        spec: contains the limits.
        report: the report of all rows.
        examples: some values of the target that are not numbers.

    Raises:
        DataError: a share is above its limit; the message contains the counts and the ways out.
    """
    num_rows, dropped, target = report["rows_read"], report["rows_dropped"], report["target"]
    num_values = num_rows - target["missing"]
    if target["unconvertible"] > spec.max_unconvertible * num_values:
        raise DataError(
            f"the target {spec.target!r}: {target['unconvertible']} of {num_values} values are not numbers, such as "
            f"{named(examples)}, and their rows would be dropped; the limit is a share of {spec.max_unconvertible:g}: "
            f"{propose(examples, spec.reader)}, or raise data.max_unconvertible"
        )
    if (num_dropped := sum(dropped.values())) > spec.max_dropped * num_rows:
        raise DataError(
            f"{num_dropped} of {num_rows} rows of {spec.uri} would be dropped: {dropped['target_missing']} without a value "
            f"in the target {spec.target!r}, {dropped['value_missing']} with a missing value in a column of missing: "
            f"drop_row; the limit is a share of {spec.max_dropped:g}: check data.target and data.missing_values, choose "
            "another policy for missing values, or raise data.max_dropped"
        )


def refuse_empty(spec: DataSpec, num_before: Mapping[str, int], num_kept: Mapping[str, int]) -> None:
    """Rejects a split without rows after cleaning.

    Raises:
        DataError: a split has no rows left.
    """
    for split in SPLITS:
        if not num_kept[split] and (num_before[split] or split == "train"):
            raise DataError(
                f"the {split} split of {spec.uri} has no rows left ({num_before[split]} before rows with missing values "
                f"were dropped); add rows, or change data.split"
            )
