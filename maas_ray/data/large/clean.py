"""Reads, casts, splits and cleans the rows of one unit, for the statistics and for the shards."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.large.count_keys import KeyedSplit
from maas_ray.data.large.survey import Kinds
from maas_ray.data.large.units import UnitSource, read_blocks
from maas_ray.data.sources.cast import CastColumn, apply_cast
from maas_ray.data.spec.data import SPLITS
from maas_ray.data.table.plan import ColumnPlan
from maas_ray.data.table.rare_classes import count_merged, merge_rare
from maas_ray.data.table.report import drop_rows
from maas_ray.data.table.split import assign_range
from maas_ray.data.table.split_rules import count_keys, split_keys
from maas_ray.data.table.target import Target, cast_part_of_target
from maas_ray.data.table.weight import cast_weight
from maas_ray.errors import DataError


@dataclass(frozen=True)
class CleaningJob:
    """The parameters that every task on the rows needs."""

    source: UnitSource
    kinds: Kinds
    plans: tuple[ColumnPlan, ...]
    """One per feature, in order."""
    split: KeyedSplit = field(default_factory=KeyedSplit)
    """The split by the values of a column, and the classes to merge."""


@dataclass(frozen=True)
class CleanBlock:
    """A block of rows."""

    table: pa.Table
    """The cast features."""
    target: Target
    columns: list[CastColumn]
    kept: NDArray[np.bool_]
    """[N]: whether each row is kept."""
    assigned: NDArray[np.int8]
    """[N]: the index of each row's split in `SPLITS`."""
    report: Mapping[str, Any]
    weight: pa.Array | None = None
    """float32 [N]; None: the spec has no weights."""

    def rows(self, split: str) -> pa.Array:
        """The kept rows of a split, ascending."""
        return pa.array(np.flatnonzero(self.kept & (self.assigned == SPLITS.index(split))))


def read_clean(job: CleaningJob, number: int) -> Iterator[CleanBlock]:
    """The rows of a unit in order.

    Raises:
        DataError: a file cannot be read, its values cannot be cast, or its number of rows has changed.
    """
    source, spec = job.source, job.source.spec
    counts = source.num_rows or ()
    start, total = [0, *accumulate(counts)][number], sum(counts)
    stop = start + counts[number]
    before = Counter(job.split.before[number] if job.split.before else {})
    for block in read_blocks(source, number):
        if start + block.num_rows > stop:
            raise _changed(source)
        columns = [apply_cast(source.field(name), block.column(name), cast) for name, cast in job.kinds.columns.items()]
        target = cast_part_of_target(
            spec.target, block.column(spec.target), spec.task, job.kinds.is_whole_target, spec.reader
        )
        assigned = _assign(job, block, start, total, before)
        start += block.num_rows
        kept, report = drop_rows(columns, job.plans, target, block.num_rows)
        if spec.rare_classes is not None:
            report["rare_classes"] = count_merged(target, job.split.rare)
            target = merge_rare(spec, target, job.split.rare)
        table = pa.table([column.values for column in columns], schema=pa.schema([column.field for column in columns]))
        weight = cast_weight(spec.weight, block.column(spec.weight), spec.reader) if spec.weight is not None else None
        yield CleanBlock(table, target, columns, kept, assigned, report, weight)
    if start != stop:
        raise _changed(source)


def _assign(job: CleaningJob, block: pa.Table, start: int, total: int, before: Counter[str]) -> NDArray[np.int8]:
    """The splits of the rows from `start` on; adds the block's values to `before`."""
    spec, rule = job.source.spec, job.split.rule
    key = spec.split.key(spec.target)
    if rule is None or key is None:
        column = block.column(spec.split.column) if spec.split.column else None
        return assign_range(spec.split, total, start, start + block.num_rows, column)
    keys = split_keys(key, block.column(key))
    try:
        assigned = rule.assign(keys, before)
    except KeyError:
        raise _changed(job.source) from None
    if job.split.before:
        before.update(count_keys(keys))
    return assigned


def _changed(source: UnitSource) -> DataError:
    return DataError(f"{source.spec.uri} changed while it was being read; prepare it again once its files are complete")
