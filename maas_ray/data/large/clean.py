"""Reads, casts, splits and cleans the rows of one unit, for the statistics and for the shards."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.large.survey import Kinds
from maas_ray.data.large.units import UnitSource, read_blocks
from maas_ray.data.sources.cast import CastColumn, apply_cast
from maas_ray.data.spec.data import SPLITS
from maas_ray.data.table.plan import ColumnPlan
from maas_ray.data.table.report import drop_rows
from maas_ray.data.table.split import assign_range
from maas_ray.data.table.target import Target, cast_part_of_target
from maas_ray.errors import DataError


@dataclass(frozen=True)
class CleaningJob:
    """The parameters that every task on the rows needs."""

    source: UnitSource
    kinds: Kinds
    plans: tuple[ColumnPlan, ...]
    """One per feature, in order."""


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
    for block in read_blocks(source, number):
        if start + block.num_rows > stop:
            raise _changed(source)
        columns = [apply_cast(source.field(name), block.column(name), cast) for name, cast in job.kinds.columns.items()]
        target = cast_part_of_target(spec.target, block.column(spec.target), spec.task, job.kinds.is_whole_target)
        split = block.column(spec.split.column) if spec.split.column else None
        assigned = assign_range(spec.split, total, start, start + block.num_rows, split)
        start += block.num_rows
        kept, report = drop_rows(columns, job.plans, target, block.num_rows)
        table = pa.table([column.values for column in columns], schema=pa.schema([column.field for column in columns]))
        yield CleanBlock(table, target, columns, kept, assigned, report)
    if start != stop:
        raise _changed(source)


def _changed(source: UnitSource) -> DataError:
    return DataError(f"{source.spec.uri} changed while it was being read; prepare it again once its files are complete")
