"""Merges classes with few rows into one class. Independent of how rows are read."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.spec.data import DataSpec
from maas_ray.data.table.target import Target
from maas_ray.errors import DataError


def find_rare(spec: DataSpec, counts: Mapping[str, int]) -> frozenset[str]:
    """The classes to merge.

    Args:
        spec: the data spec.
        counts: rows of each class over the whole data set; "" is a missing target and no class.

    Raises:
        DataError: a merge leaves fewer than two classes, or the merged class is still too small.
    """
    rule = spec.rare_classes
    if rule is None:
        return frozenset()
    rare = {name for name, rows in counts.items() if name and rows < rule.min_rows}
    kept = {name for name in counts if name} - rare
    if not rare - {rule.merge_into}:
        return frozenset()
    merged = sum(counts[name] for name in rare | {rule.merge_into} if name in counts)
    if len(kept | {rule.merge_into}) < 2:
        raise DataError(
            f"data.rare_classes: no class of the target {spec.target!r} has {rule.min_rows} rows or more; lower min_rows"
        )
    if merged < rule.min_rows:
        named = ", ".join(map(repr, sorted(rare)[:10]))
        raise DataError(
            f"data.rare_classes: the merged class {rule.merge_into!r} ({named}) has {merged} rows, fewer than min_rows "
            f"{rule.min_rows}; merge into an existing class, or lower min_rows"
        )
    return frozenset(rare)


def merge_rare(spec: DataSpec, target: Target, rare: frozenset[str]) -> Target:
    """The target with rare classes replaced by the merged class."""
    if spec.rare_classes is None or not rare:
        return target
    is_rare = pc.is_in(target.values, value_set=pa.array(sorted(rare), pa.string()))
    merged = pc.if_else(is_rare, spec.rare_classes.merge_into, target.values)
    return replace(target, values=merged)


def count_merged(target: Target, rare: frozenset[str]) -> dict[str, int]:
    """Rows of each merged class in a block before the merge, for the report."""
    values = np.asarray(target.values.to_numpy(zero_copy_only=False), dtype=object)
    return {name: int((values == name).sum()) for name in sorted(rare)}
