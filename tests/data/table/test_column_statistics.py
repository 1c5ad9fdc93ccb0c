"""Statistics are those of the training split alone, and the same for every number of blocks."""

import math
import statistics
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.cleaning import CleaningSpec
from maas_ray.data.table.column_statistics import require_cpu
from maas_ray.data.table.fit import fit_columns
from maas_ray.data.table.plan import ColumnPlan
from maas_ray.errors import ClusterError, DataError

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data 2.60 warns of a default of its own context.
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle. is deprecated:DeprecationWarning"),
]

N = 500
FEW = CleaningSpec(max_categories=100)


def _column(seed: int, holes: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.normal(size=N), rng.integers(-30, 30, N)).astype(np.float32)
    if holes:
        values[rng.random(N) < 0.2] = np.nan
    return values


def _table() -> tuple[pa.Table, list[ColumnPlan]]:
    """One column per combination that is fitted differently."""
    rng = np.random.default_rng(5)
    fields, arrays, plans = [], [], []

    def add(plan: ColumnPlan, array: Any, field: pa.Field | None = None) -> None:
        plans.append(plan)
        arrays.append(array)
        fields.append(field or pa.field(plan.name, array.type))

    for i, missing in enumerate(("error", "mean", "median", "most_frequent", "constant")):
        for scaling in ("none", "standard", "min_max"):
            values = _column(i, holes=missing != "error")
            if missing == "most_frequent":
                values = np.round(values)
            plan = ColumnPlan(f"{missing} {scaling}", "numeric", missing, 7.1, scaling)
            add(plan, pa.array(values))
    words = rng.choice(["", "a", "b", "c"], size=N, p=[0.2, 0.1, 0.3, 0.4])
    add(ColumnPlan("word", "categorical", "most_frequent"), pa.array(words.tolist()))
    add(ColumnPlan("other", "categorical", "constant", "zz"), pa.array(words.tolist()))
    add(ColumnPlan("number", "categorical", "error", is_integer=True), pa.array(rng.integers(0, 5, N)))
    vectors = rng.normal(size=(N, 3)).astype(np.float32)
    field, array = tensor_field("vector", vectors)
    add(ColumnPlan("vector", "tensor", "error", scaling="standard", shape=(3,)), array, field)
    images = rng.integers(0, 256, size=(N, 1, 4, 4)).astype(np.uint8)
    field, array = tensor_field("image", images)
    add(ColumnPlan("image", "tensor", "error", scaling="standard", is_bytes=True, shape=(1, 4, 4)), array, field)
    holes = np.where(rng.random((N, 2, 2)) < 0.1, np.nan, rng.normal(size=(N, 2, 2))).astype(np.float32)
    field, array = tensor_field("holes", holes)
    add(ColumnPlan("holes", "tensor", "mean", scaling="min_max", shape=(2, 2)), array, field)
    return pa.table(arrays, schema=pa.schema(fields)), plans


def test_the_number_of_blocks_and_the_order_of_rows_change_no_bit() -> None:
    table, plans = _table()
    whole = fit_columns(table, plans, FEW, block_rows=N)
    assert fit_columns(table, plans, FEW, block_rows=73) == whole
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(N)))
    assert fit_columns(shuffled, plans, FEW, block_rows=101) == whole
    changed = fit_columns(table.slice(1), plans, FEW)
    assert changed != whole


def test_fills_and_scales_equal_an_independent_computation() -> None:
    table, plans = _table()
    fitted = {column.name: column for column in fit_columns(table, plans, FEW, block_rows=200)}
    for plan in plans[:15]:
        values = table.column(plan.name).to_numpy()
        present = [float(value) for value in values if not math.isnan(value)]
        fill = {
            "mean": lambda: math.fsum(present) / len(present),
            "median": lambda: statistics.median(present),
            "most_frequent": lambda: min(statistics.multimode(present)),
            "constant": lambda: 7.1,
        }.get(plan.missing, lambda: None)()
        found = fitted[plan.name]
        assert found.fill == (None if fill is None else pytest.approx(np.float32(fill), rel=1e-7))
        filled = present if fill is None else present + [found.fill] * (len(values) - len(present))
        if plan.scaling == "standard":
            assert found.shift == pytest.approx(statistics.fmean(filled), rel=1e-12)
            assert found.scale == pytest.approx(statistics.pstdev(filled), rel=1e-12)
        elif plan.scaling == "min_max":
            assert (found.shift, found.scale) == (min(filled), max(filled) - min(filled))
        else:
            assert (found.shift, found.scale) == (0.0, 1.0)
    assert fitted["word"].categories == ("a", "b", "c")
    assert fitted["word"].categories[fitted["word"].fill] == "c"
    assert fitted["other"].categories == ("a", "b", "c", "zz")
    assert fitted["other"].fill == 3
    assert fitted["number"].categories == (0, 1, 2, 3, 4)
    assert fitted["number"].fill is None
    vectors = np.stack(table.column("vector").to_pylist()).astype(np.float64)
    np.testing.assert_allclose(fitted["vector"].shift, vectors.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(fitted["vector"].scale, vectors.std(axis=0), rtol=1e-9)
    images = np.stack(table.column("image").to_pylist()).astype(np.float64)
    assert fitted["image"].shift == (pytest.approx(images.mean(), rel=1e-12),)
    assert fitted["image"].scale == (pytest.approx(images.std(), rel=1e-12),)
    holes = np.stack(table.column("holes").to_pylist()).astype(np.float64)
    assert fitted["holes"].fill == pytest.approx(np.nanmean(holes), rel=1e-6)
    assert fitted["holes"].shift == (np.nanmin(holes),)


@pytest.mark.parametrize("scaling", ["standard", "min_max"])
def test_a_constant_column_is_only_shifted(scaling: str) -> None:
    table = pa.table({"a": pa.array(np.full(9, 0.1, np.float32))})
    (column,) = fit_columns(table, [ColumnPlan("a", "numeric", "error", scaling=scaling)], FEW)
    assert column.scale == 1.0
    assert column.shift == float(np.float32(0.1))


def test_a_column_without_a_value_or_with_too_many_categories_is_refused() -> None:
    table = pa.table({"a": pa.array([np.nan] * 4, pa.float32()), "b": ["w", "x", "y", "z"]})
    with pytest.raises(DataError, match=r"column 'a' has no value in the training split \(4 missing\)"):
        fit_columns(table.select(["a"]), [ColumnPlan("a", "numeric", "mean")], FEW)
    with pytest.raises(DataError, match="column 'b' has 4 categories; the limit is 3"):
        fit_columns(table.select(["b"]), [ColumnPlan("b", "categorical", "error")], CleaningSpec(max_categories=3))


@ray.remote
class _Holder:
    def ready(self) -> bool:
        return True


def test_a_cluster_without_a_free_cpu_is_reported_instead_of_waited_for() -> None:
    total = ray.cluster_resources()["CPU"]
    holder = _Holder.options(num_cpus=total).remote()
    try:
        ray.get(holder.ready.remote(), timeout=60)
        with pytest.raises(ClusterError, match=rf"no CPU .* within 0.5 s \(0 of {total:g} are free\)"):
            require_cpu(0.5)
    finally:
        ray.kill(holder)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < total and time.monotonic() < deadline:
        time.sleep(0.05)
    require_cpu(60)
