"""Gathers counts, statistics, classes and digests of all rows, which are needed before the first row is written.

Every partial result is a count, an exact sum, an extreme, a set or the digest of one unit, so that the total depends
neither on the order in which tasks end nor on how often a task ran.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.large.clean import CleanBlock, CleaningJob, read_clean
from maas_ray.data.large.tasks import run_tasks
from maas_ray.data.spec.data import SPLITS
from maas_ray.data.stored.dataset import WEIGHT
from maas_ray.data.table.column_statistics import (
    Statistics,
    count_high,
    count_low,
    median_buckets,
    median_places,
    merge,
    set_medians,
    summarize,
)
from maas_ray.data.table.exact_stats import power_sums
from maas_ray.data.table.fit import refuse_categories
from maas_ray.data.table.refusals import Refusals
from maas_ray.data.table.report import add_counts, refuse_dropped, refuse_empty, refuse_missing, refuse_without_value
from maas_ray.data.table.split_rules import count_keys
from maas_ray.data.table.target import refuse_classes, require_target
from maas_ray.data.table.weight import num_weighted, refuse_no_weight
from maas_ray.errors import DataError

MAX_VALUES = 1 << 20
"""Maximum number of distinct values of one column in memory."""
HELD_OUT = SPLITS[1:]
Low = defaultdict[tuple[str, int], Counter[int]]
"""Counts by column and bucket: see `count_low`."""


@dataclass
class Gathered:
    """Results over all rows."""

    statistics: dict[str, Statistics]
    """Statistics of the training split, by column."""
    report: dict[str, Any] = field(default_factory=dict)
    """See `prepare`."""
    num_rows: dict[str, int] = field(default_factory=dict)
    """Kept rows, by split."""
    classes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Rows of each class, by split."""
    target_sums: tuple[int, int] = (0, 0)
    """Regression: `power_sums` of the target of the training split."""
    values: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    """By categorical column: the values in the held-out splits."""
    content: dict[str, str] = field(default_factory=dict)
    """Hex sha256 of the values, by split."""


def gather(job: CleaningJob, cpu_timeout_s: float) -> Gathered:
    """Reads all rows once, or twice if a median is needed.

    Raises:
        DataError: the rows do not fit the spec.
        ClusterError: a task could not run.
    """
    num_units = len(job.source.units)
    found = Gathered({plan.name: Statistics() for plan in job.plans})
    counts: dict[str, Any] = {}
    digests: dict[int, dict[str, str]] = {}
    high: dict[str, Counter[int]] = {name: Counter() for name in _medians(job)}
    what = "the statistics of the training split"
    with closing(run_tasks(gather_unit, num_units, {"job": job}, what, cpu_timeout_s, job.source.name_of)) as answers:
        for number, answer in answers:
            digests[number] = answer["content"]
            counts = add_counts(counts, answer["counts"])
            _take_statistics(job, found, answer)
            for name, pairs in answer["high"].items():
                high[name].update(dict(pairs))
    _check(job, counts)
    found.report, found.num_rows = counts["report"], counts["kept"]
    for split in HELD_OUT:
        refuse_classes(
            job.source.spec.target, sorted(found.classes[split].keys() - found.classes["train"].keys()), split
        )
    for split in SPLITS:
        found.content[split] = sha256("".join(digests[i][split] for i in range(num_units)).encode()).hexdigest()
    _find_medians(job, {name: one for name, one in high.items() if one}, found.statistics, cpu_timeout_s)
    return found


def gather_unit(number: int, job: CleaningJob) -> dict[str, Any]:
    """Summarizes one unit; the result is as small as that of one block."""
    contents = {split: Content() for split in SPLITS}
    statistics = {plan.name: Statistics() for plan in job.plans}
    high: dict[str, Counter[int]] = {name: Counter() for name in _medians(job)}
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    values: dict[str, set[Any]] = defaultdict(set)
    counts: dict[str, Any] = {}
    sums = [0, 0]
    for block in read_clean(job, number):
        counts = add_counts(counts, _count(job, block))
        for split in SPLITS:
            rows = block.rows(split)
            if not len(rows):
                continue
            table, target = block.table.take(rows), block.target.values.take(rows)
            named = table if block.weight is None else table.append_column(WEIGHT, block.weight.take(rows))
            contents[split].add(named, target)
            if job.source.spec.task != "regression":
                classes[split].update(count_keys(target))
            elif split == "train":
                sums = [total + more for total, more in zip(sums, power_sums(target.to_numpy()), strict=True)]
            if split == "train":
                _merge(job, statistics, summarize(table, job.plans))
                for name, pairs in count_high(table, list(high)).items():
                    high[name].update(dict(pairs))
                continue
            for plan in job.plans:
                if plan.kind == "categorical":
                    values[plan.name].update(pc.unique(table.column(plan.name)).to_pylist())
    return {
        "counts": counts,
        "content": {split: content.hexdigest() for split, content in contents.items()},
        "statistics": {name: one.partial() for name, one in statistics.items()},
        "high": {name: list(one.items()) for name, one in high.items()},
        "classes": {name: dict(found) for name, found in classes.items()},
        "target_sums": sums,
        "values": {name: sorted(found) for name, found in values.items()},
    }


def count_unit(number: int, job: CleaningJob, buckets: Mapping[str, list[int]]) -> dict[str, list[Any]]:
    """The second pass of the medians over one unit: by column, the counts of each bucket."""
    low: Low = defaultdict(Counter)
    for block in read_clean(job, number):
        table = block.table.take(block.rows("train"))
        if table.num_rows:
            _add_low(low, count_low(table, buckets))
    return {name: [(bucket, list(low[name, bucket].items())) for bucket in wanted] for name, wanted in buckets.items()}


class Content:
    """The digest of values, independent of their blocks and their Arrow encoding."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(sha256)

    def add(self, table: pa.Table, target: pa.Array) -> None:
        """Adds rows."""
        for name in table.column_names:
            self._add(f"column {name}", table.column(name).combine_chunks())
        self._add("target", target)

    def hexdigest(self) -> str:
        """Hex digest of all rows so far."""
        parts = sorted((name, one.hexdigest()) for name, one in self._sums.items())
        return sha256(repr(parts).encode()).hexdigest()

    def _add(self, name: str, column: pa.Array) -> None:
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        if pa.types.is_fixed_size_list(column.type):
            column = column.flatten()
        if pa.types.is_string(column.type):
            ends = np.frombuffer(column.buffers()[1], dtype="<i4")[column.offset : column.offset + len(column) + 1]
            self._sums[f"{name} lengths"].update(np.diff(ends).astype("<i4").tobytes())
            if (data := column.buffers()[2]) is not None:
                self._sums[f"{name} text"].update(memoryview(data)[int(ends[0]) : int(ends[-1])])
        else:
            values = column.to_numpy(zero_copy_only=False)
            little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
            self._sums[f"{name} {values.dtype.str[1:]}"].update(little.data)


def _count(job: CleaningJob, block: CleanBlock) -> dict[str, Any]:
    return {
        "report": block.report,
        "before": {split: int((block.assigned == code).sum()) for code, split in enumerate(SPLITS)},
        "kept": {split: len(block.rows(split)) for split in SPLITS},
        "weighted": 1 if block.weight is None else num_weighted(block.weight.take(block.rows("train"))),
        "absent": {plan.name: int(one.missing.sum()) for plan, one in zip(job.plans, block.columns, strict=True)},
        "missing": {
            plan.name: int((one.missing & block.kept).sum()) for plan, one in zip(job.plans, block.columns, strict=True)
        },
    }


def _check(job: CleaningJob, counts: Mapping[str, Any]) -> None:
    """Rejects the data that `prepare` rejects."""
    spec, report = job.source.spec, counts["report"]
    num_rows = report["rows_read"]
    target = report["target"]
    require_target(spec.target, num_rows, report["rows_dropped"]["target_missing"], target["unconvertible"], spec.task)
    num_kept = sum(counts["kept"].values())
    for plan in job.plans:
        if counts["absent"][plan.name] == num_rows:
            refuse_without_value(plan.name, num_rows, report["columns"][plan.name]["unconvertible"])
    refuse_dropped(spec, report, job.kinds.target_examples)
    refusals = Refusals()
    for plan in job.plans:
        with refusals.collect():
            refuse_missing(plan, counts["missing"][plan.name], num_kept)
    refusals.refuse()
    refuse_empty(spec, counts["before"], counts["kept"])
    refuse_no_weight(spec.weight, counts["weighted"])


def _take_statistics(job: CleaningJob, found: Gathered, answer: Mapping[str, Any]) -> None:
    _merge(job, found.statistics, answer["statistics"])
    for split, classes in answer["classes"].items():
        found.classes[split].update(classes)
    total, squares = answer["target_sums"]
    found.target_sums = (found.target_sums[0] + total, found.target_sums[1] + squares)
    for name, values in answer["values"].items():
        found.values[name].update(values)
        if len(found.values[name]) > MAX_VALUES:
            raise DataError(
                f"column {name!r} has more than {MAX_VALUES} categories in the held-out rows; leave it out with "
                "cleaning.drop"
            )


def _merge(job: CleaningJob, into: Mapping[str, Statistics], partial: Mapping[str, Any]) -> None:
    for plan in job.plans:
        merge(into[plan.name], partial[plan.name])
        # Checked early: an identifier that is used as a category would fill the memory.
        _refuse_many(job, plan.name, plan.kind, len(into[plan.name].counts))


def _refuse_many(job: CleaningJob, name: str, kind: str, num_values: int) -> None:
    if kind == "categorical":
        refuse_categories(name, num_values, job.source.spec.cleaning.max_categories)
    elif num_values > MAX_VALUES:
        raise DataError(
            f"column {name!r} has more than {MAX_VALUES} distinct numbers, the limit for missing: most_frequent; set "
            f"cleaning.columns.{name}.missing to median or mean"
        )


def _medians(job: CleaningJob) -> list[str]:
    return [plan.name for plan in job.plans if plan.missing == "median"]


def _find_medians(
    job: CleaningJob, high: Mapping[str, Counter[int]], merged: Mapping[str, Statistics], cpu_timeout_s: float
) -> None:
    if not high:
        return
    places = median_places(high, merged)
    low: Low = defaultdict(Counter)
    arguments = {"job": job, "buckets": median_buckets(places)}
    source = job.source
    for _, answer in run_tasks(count_unit, len(source.units), arguments, "the medians", cpu_timeout_s, source.name_of):
        _add_low(low, answer)
    set_medians(places, low, merged)


def _add_low(low: Low, counted: Mapping[str, Any]) -> None:
    for name, buckets in counted.items():
        for bucket, pairs in buckets:
            low[name, bucket].update(dict(pairs))
