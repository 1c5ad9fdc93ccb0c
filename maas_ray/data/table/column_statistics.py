"""Computes statistics of the training split block by block in Ray Data tasks, and merges them exactly.

A table of one block is summarized in this process: a task for it would wait 4 s for a worker to start and import Ray
Data, and the computation takes less than 1 s. Every partial result is a count, an exact sum (an integer) or an extreme,
so the merged result depends neither on the number of blocks nor on their order. Partial results are sent as JSON text.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from maas_ray.data.sources.wide import narrowing_in
from maas_ray.data.table import exact_stats
from maas_ray.data.table.plan import ColumnPlan
from maas_ray.errors import ClusterError
from maas_ray.ray_internals.data import LOGGER, PROGRESS_LOGGER

Places = dict[str, list[tuple[int, int]]]

MAX_BLOCK_ROWS = 1 << 16
MAX_BLOCK_BYTES = 1 << 26
"""Maximum bytes of a task's block. Results never depend on it."""
CPU_TIMEOUT_S = 300.0
"""Longest wait for a free CPU of the cluster, if there are several blocks."""


@dataclass
class Statistics:
    """Statistics of one column over the whole training split; a field is set only if the column's plan needs it."""

    num_present: int = 0
    """Values that are not missing; for a tensor, elements."""
    num_missing: int = 0
    sums: list[int] = field(default_factory=list)
    """Exact sums in the units of `exact_stats.power_sums`: one, or one per element of a vector."""
    squares: list[int] = field(default_factory=list)
    """Exact sums of squares, as `sums`."""
    present: list[int] = field(default_factory=list)
    """Values that are not missing, as `sums`."""
    minima: list[float] = field(default_factory=list)
    maxima: list[float] = field(default_factory=list)
    counts: Counter[Any] = field(default_factory=Counter)
    """Rows per value."""
    median: float | None = None

    def partial(self) -> dict[str, Any]:
        """The statistics merged so far, as JSON for `merge`."""
        return {
            "num_present": self.num_present,
            "num_missing": self.num_missing,
            "present": self.present,
            "sums": self.sums,
            "squares": self.squares,
            "minima": self.minima,
            "maxima": self.maxima,
            "counts": list(self.counts.items()),
        }


def gather_statistics(
    table: pa.Table,
    plans: Sequence[ColumnPlan],
    block_rows: int | None = None,
    cpu_timeout_s: float = CPU_TIMEOUT_S,
) -> dict[str, Statistics]:
    """Computes the statistics of a cast table's columns.

    Args:
        table: the training split.
        plans: one per column.
        block_rows: rows per Ray Data block; by default as many as `MAX_BLOCK_ROWS` and `MAX_BLOCK_BYTES` allow.
        cpu_timeout_s: longest wait for a free CPU of the Ray cluster, if there is more than one block.

    Raises:
        ClusterError: there are several blocks, and Ray is not connected, no CPU became free in time or a task failed.
    """
    merged = {plan.name: Statistics() for plan in plans}
    fitting = MAX_BLOCK_BYTES * table.num_rows // max(table.nbytes, 1)
    block_rows = block_rows or max(1, min(MAX_BLOCK_ROWS, fitting))
    if table.num_rows > block_rows:
        require_cpu(cpu_timeout_s)
    for partial in _over_blocks(table, block_rows, _summarize, {"plans": list(plans)}):
        for plan in plans:
            merge(merged[plan.name], partial[plan.name])
    wanted = [plan.name for plan in plans if plan.missing == "median" and merged[plan.name].num_present]
    if wanted:
        _fill_medians(table, wanted, merged, block_rows)
    return merged


def require_ray() -> None:
    """Raises `ClusterError` unless Ray is connected."""
    if not ray.is_initialized():
        raise ClusterError(
            "Ray is not connected, but cleaning runs on Ray; call ray.init(), start a cluster with `maas-ray up`, "
            "or submit the job with `ray job submit`"
        )


def require_cpu(cpu_timeout_s: float) -> None:
    """Checks that tasks can run: Ray Data itself would wait for a CPU forever.

    Raises:
        ClusterError: Ray is not connected, or no CPU became free in time.
    """
    require_ray()
    probe = ray.remote(_probe).options(num_cpus=1, max_retries=0).remote()
    try:
        ray.get(probe, timeout=cpu_timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(probe, force=True)
        total, free = (resources.get("CPU", 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
        raise ClusterError(
            f"no CPU of the Ray cluster became free within {cpu_timeout_s:g} s ({free:g} of {total:g} are free); "
            f"stop the tasks or actors that use them, or add a node"
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the Ray cluster could not run a task: {error}") from error


def _probe() -> None:
    """Does nothing, but needs a CPU."""


def _over_blocks(
    table: pa.Table, block_rows: int, function: Callable[..., pa.Table], arguments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    blocks = [table.slice(start, block_rows) for start in range(0, table.num_rows, block_rows)]
    if len(blocks) <= 1:
        return [json.loads(text) for block in blocks for text in function(block, **arguments)["partial"].to_pylist()]
    import ray.data  # imported late: it takes 0.9 s, with pandas

    dataset = ray.data.from_arrow(blocks)
    dataset.context.enable_progress_bars = False
    try:
        with quiet():
            rows = dataset.map_batches(
                function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs=dict(arguments)
            ).take_all()
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the statistics of the training split could not be computed: {error}") from error
    return [json.loads(row["partial"]) for row in rows]


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the four lines that Ray Data prints per execution and its warning about progress bars; keeps others."""
    levels = {LOGGER: logging.WARNING, PROGRESS_LOGGER: logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _partial(content: Mapping[str, Any]) -> pa.Table:
    return pa.table({"partial": [json.dumps(content)]})


def _summarize(block: pa.Table, plans: list[ColumnPlan]) -> pa.Table:
    return _partial(summarize(block, plans))


def summarize(block: pa.Table, plans: Sequence[ColumnPlan]) -> dict[str, Any]:
    """Summarizes one block with at least one row, except for medians: JSON for `merge`."""
    return {plan.name: _summarize_column(plan, block.column(plan.name)) for plan in plans}


def _summarize_column(plan: ColumnPlan, column: pa.ChunkedArray) -> dict[str, Any]:
    if plan.kind == "categorical":
        counts = Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()})
        num_missing = 0 if plan.is_integer else counts.pop("", 0)
        return {
            "num_present": counts.total(),
            "num_missing": num_missing,
            "counts": sorted(counts.items()),
        }
    values = _floats(plan, column)
    present = ~np.isnan(values)
    result: dict[str, Any] = {"num_present": int(present.sum()), "num_missing": int((~present).sum())}
    series = [values[:, i] for i in range(values.shape[1])] if plan.is_per_element else [values.reshape(-1)]
    series = [one[~np.isnan(one)] for one in series]
    result["present"] = [len(one) for one in series]
    if plan.scaling == "standard" or plan.missing == "mean":
        sums = [exact_stats.power_sums(one) for one in series]
        result.update(sums=[total for total, _ in sums], squares=[square for _, square in sums])
    if plan.scaling == "min_max" or plan.kind != "tensor":
        result["minima"] = [float(one.min()) if len(one) else None for one in series]
        result["maxima"] = [float(one.max()) if len(one) else None for one in series]
    if plan.missing == "most_frequent":
        found, counted = np.unique(series[0], return_counts=True)
        result["counts"] = list(zip(found.tolist(), counted.tolist(), strict=True))
    return result


def _floats(plan: ColumnPlan, column: pa.ChunkedArray) -> NDArray[np.float32]:
    """The values [N], or [N, elements] for a tensor or a date."""
    if plan.narrowing is not None:
        wide = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks]).reshape(-1, 1)
        narrow: NDArray[np.float32] = plan.narrowing.apply(np, wide)
        return narrow if plan.kind == "date" else narrow.reshape(-1)
    chunks = [chunk.flatten() if plan.kind == "tensor" else chunk for chunk in column.chunks]
    flat = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks]).astype(np.float32)
    return flat.reshape(len(column), -1) if plan.kind == "tensor" else flat


def merge(into: Statistics, partial: Mapping[str, Any]) -> None:
    """Merges the result of `summarize` for one more block."""
    into.num_present += partial["num_present"]
    into.num_missing += partial["num_missing"]
    for name in ("present", "sums", "squares"):
        _combine(getattr(into, name), partial.get(name, ()), lambda a, b: a + b)
    _combine(into.minima, partial.get("minima", ()), min)
    _combine(into.maxima, partial.get("maxima", ()), max)
    for value, count in partial.get("counts", ()):
        into.counts[value] += count


def _combine(into: list[Any], values: Sequence[Any], operation: Callable[[Any, Any], Any]) -> None:
    """Combines element by element; None represents a block without a value."""
    if not into:
        into.extend(values)
        return
    for i, value in enumerate(values):
        if value is not None:
            into[i] = value if into[i] is None else operation(into[i], value)


def _fill_medians(table: pa.Table, names: list[str], merged: dict[str, Statistics], block_rows: int) -> None:
    high: dict[str, Counter[int]] = {name: Counter() for name in names}
    chosen = table.select(names)
    for partial in _over_blocks(chosen, block_rows, _count_high, {"names": names}):
        for name in names:
            high[name].update(dict(partial[name]))
    places = median_places(high, merged)
    low: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    buckets = median_buckets(places)
    for partial in _over_blocks(chosen, block_rows, _count_low, {"buckets": buckets}):
        for name in names:
            for bucket, counts in partial[name]:
                low[name, bucket].update(dict(counts))
    set_medians(places, low, merged)


def median_places(high: Mapping[str, Counter[int]], merged: Mapping[str, Statistics]) -> Places:
    """By column: bucket, and rank in it, of the two values whose mean is the median; from `count_high`."""
    return {
        name: [exact_stats.locate(counts, rank) for rank in exact_stats.median_ranks(merged[name].num_present)]
        for name, counts in high.items()
    }


def median_buckets(places: Places) -> dict[str, list[int]]:
    """By column: the buckets that `count_low` must count."""
    return {name: sorted({bucket for bucket, _ in found}) for name, found in places.items()}


def set_medians(places: Places, low: Mapping[tuple[str, int], Counter[int]], merged: Mapping[str, Statistics]) -> None:
    """Sets the medians, from `count_low` of all blocks."""
    for name, found in places.items():
        pair = [exact_stats.value_of(bucket, exact_stats.locate(low[name, bucket], rank)[0]) for bucket, rank in found]
        merged[name].median = (pair[0] + pair[1]) / 2


def _present(block: pa.Table, name: str) -> NDArray[np.float32]:
    narrowing = narrowing_in(block.schema.field(name))
    values: NDArray[Any] = block.column(name).to_numpy()
    narrow: NDArray[np.float32] = (
        values if narrowing is None else narrowing.apply(np, values.reshape(-1, 1)).reshape(-1)
    )
    return narrow[~np.isnan(narrow)]


def _count_high(block: pa.Table, names: list[str]) -> pa.Table:
    return _partial(count_high(block, names))


def count_high(block: pa.Table, names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """The first pass of medians over one block: the counts of upper bits as JSON."""
    return {name: list(exact_stats.high_counts(_present(block, name)).items()) for name in names}


def _count_low(block: pa.Table, buckets: dict[str, list[int]]) -> pa.Table:
    return _partial(count_low(block, buckets))


def count_low(block: pa.Table, buckets: Mapping[str, Sequence[int]]) -> dict[str, list[tuple[int, Any]]]:
    """The second pass of medians: the counts of lower bits of the values in `buckets`."""
    return {
        name: [
            (bucket, list(exact_stats.low_counts(_present(block, name), bucket).items())) for bucket in buckets[name]
        ]
        for name in buckets
    }
