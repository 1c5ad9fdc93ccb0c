"""Splits by stratum, by group and in order: exact shares, nothing leaks, folds are a partition, blocks do not matter."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.split import SPLITS, SplitSpec
from maas_ray.data.table.split import assign_table
from maas_ray.data.table.split_rules import count_keys, make_rule, refuse_leak, split_keys
from maas_ray.errors import DataError, SpecError
from maas_ray.spec import parse_spec

TRAIN, VALIDATION, TEST = range(3)
STRATIFIED = [0, 0, 2, 0, 2, 0, 1, 0, 0, 0, 0, 0]
GROUPED = [0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 1]


def _assign(split: dict[str, Any], **columns: Any) -> np.ndarray:
    spec = parse_spec(DataSpec, {"uri": "x.csv", "task": "classification", "target": "y", "split": split})
    return assign_table(spec, pa.table({name: pa.chunked_array([values]) for name, values in columns.items()}))


def _classes(**counts: int) -> list[str]:
    values = np.array([name for name, count in counts.items() for _ in range(count)])
    return np.random.default_rng(0).permutation(values).tolist()


def test_every_class_has_the_same_share_of_each_split() -> None:
    y = _classes(common=900, rare=100)
    assigned = _assign({"stratify": True}, y=y)
    for code, common, rare in ((TRAIN, 630, 70), (VALIDATION, 90, 10), (TEST, 180, 20)):
        assert Counter(np.array(y)[assigned == code].tolist()) == {"common": common, "rare": rare}


@pytest.mark.parametrize("sizes", [{"a": 2, "b": 2, "c": 96}, {f"c{i}": 3 for i in range(40)}, {"a": 1, "b": 99}])
def test_every_class_keeps_a_row_for_training_and_the_totals_are_the_fractions(sizes: dict[str, int]) -> None:
    y = _classes(**sizes)
    assigned = _assign({"stratify": True}, y=y)
    assert set(np.array(y)[assigned == TRAIN]) == set(sizes)
    assert (assigned == TEST).sum() == round(0.2 * len(y))
    assert (assigned == VALIDATION).sum() == round(0.1 * len(y))


def test_the_stratified_split_is_the_one_that_was_released() -> None:
    y = ["no", "yes", "no", "no", "yes", "no", "no", "yes", "no", "no", "yes", "no"]
    assert _assign({"stratify": True, "seed": 3}, y=y).tolist() == STRATIFIED
    assert _assign({"group": "g", "seed": 3}, y=y, g=list("aabbccddeeff")).tolist() == GROUPED


def test_rows_of_another_class_do_not_change_a_class() -> None:
    one = _assign({"stratify": True, "seed": 5}, y=["a"] * 50 + ["b"] * 100)
    two = _assign({"stratify": True, "seed": 5}, y=["a"] * 50 + ["b"] * 300)
    assert one[:50].tolist() == two[:50].tolist()


def test_a_group_is_in_one_split_in_any_order_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 300, 3000).astype(str)
    assigned = _assign({"group": "g"}, y=["a"] * 3000, g=groups)
    of_group = dict(zip(groups.tolist(), assigned.tolist(), strict=True))
    assert [of_group[group] for group in groups] == assigned.tolist()
    order = rng.permutation(3000)
    assert (_assign({"group": "g"}, y=["a"] * 3000, g=groups[order]) == assigned[order]).all()
    assert abs((assigned == TEST).mean() - 0.2) < 0.005
    assert abs((assigned == VALIDATION).mean() - 0.1) < 0.005


@pytest.mark.parametrize("sizes", [[900, 30, 30, 40], [200] * 5, [1, 1, 998], [5, 4, 3]])
def test_large_groups_are_for_training_and_no_split_is_empty(sizes: list[int]) -> None:
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    assigned = _assign({"group": "g"}, y=["a"] * len(groups), g=groups)
    assert set(assigned.tolist()) == {TRAIN, VALIDATION, TEST}
    assert set(assigned[groups == f"g{int(np.argmax(sizes))}"]) == {TRAIN} or len(set(sizes)) == 1


def test_a_planted_leak_is_found() -> None:
    groups = pa.array(["p1", "p1", "p2", "p2", "p3"])
    refuse_leak("patient", groups, np.array([0, 0, 2, 2, 1], dtype=np.int8))
    with pytest.raises(
        DataError, match="1 of 3 groups of 'patient' are in several splits, such as 'p2' in train and te"
    ):
        refuse_leak("patient", groups, np.array([0, 0, 0, 2, 1], dtype=np.int8))


def test_a_split_column_that_divides_a_group_is_refused() -> None:
    split = {"column": "part", "group": "g"}
    parts = ["train", "train", "test", "validation"]
    assert _assign(split, y=["a"] * 4, g=["1", "1", "2", "3"], part=parts).tolist() == [0, 0, 2, 1]
    with pytest.raises(DataError, match="'2' in validation and test"):
        _assign(split, y=["a"] * 4, g=["1", "1", "2", "2"], part=parts)


@pytest.mark.parametrize(
    "times",
    [
        list(range(100)),
        [f"2024-{1 + i // 28:02d}-{1 + i % 28:02d}" for i in range(100)],
        [f"2024-01-01T{i // 60:02d}:{i % 60:02d}:00Z" for i in range(100)],
        [10.0**i for i in range(-50, 50)],
        [2**53 + i for i in range(100)],
        pa.array(range(100), pa.timestamp("ns")).cast(pa.timestamp("ns")),
        pa.array(range(100), pa.date32()),
        [str(i) for i in range(100)],
    ],
    ids=["int", "date text", "time text", "float", "above 2**53", "timestamp", "date", "number text"],
)
def test_the_last_rows_are_held_out(times: Any) -> None:
    times = pa.array(times)
    if pa.types.is_timestamp(times.type):
        times = pa.array(np.arange(100) * 10**9, pa.int64()).cast(times.type)
    order = np.random.default_rng(0).permutation(100)
    assigned = _assign({"order_by": "t"}, y=["a"] * 100, t=times.take(pa.array(order)))
    assert assigned[np.argsort(order)].tolist() == [TRAIN] * 70 + [VALIDATION] * 10 + [TEST] * 20


def test_rows_of_one_day_are_not_divided() -> None:
    days = np.repeat(np.arange(10), [10, 10, 10, 10, 10, 10, 10, 10, 10, 13])
    assigned = _assign({"order_by": "day"}, y=["a"] * len(days), day=days)
    assert [sorted(set(assigned[days == day])) for day in range(10)] == [[0]] * 7 + [[1]] + [[2]] * 2


@pytest.mark.parametrize(
    ("split", "column", "says"),
    [
        ({"group": "k"}, ["a", "", "b", "c"], "1 rows have no value in 'k'"),
        ({"group": "k"}, ["a", "a", "b", "b"], "2 groups, too few for 3 parts"),
        ({"order_by": "k"}, ["a", "b", "c", "d"], "neither numbers nor dates"),
        ({"order_by": "k"}, [1, None, 2, 3], "1 rows have no value"),
        ({"order_by": "k"}, [7, 7, 7, 7], "1 distinct values, too few"),
        ({"stratify": "k"}, ["a", "b", "c", "d"], "too few for a stratified test split"),
        (
            {"stratify": "k", "test": 0, "validation": 0},
            [str(i) for i in range(1001)],
            "1001 values; the limit is 1000",
        ),
    ],
)
def test_values_that_do_not_allow_the_split_are_refused(split: dict[str, Any], column: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        _assign(split, y=["a"] * len(column), k=column)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"split": {"stratify": True, "group": "g"}}, "stratify and group cannot be combined"),
        ({"split": {"order_by": "t", "group": "g"}}, "group and order_by cannot be combined"),
        ({"split": {"order_by": "t", "column": "part"}}, "column and order_by cannot be combined"),
        ({"split": {"stratify": True, "column": "part"}}, "column and stratify cannot be combined"),
        ({"split": {"fold": {"index": 5, "of": 5}}}, "index 5 is not below"),
        ({"split": {"fold": {"index": 0, "of": 2}, "validation": 0.5}}, "leave nothing for training"),
        ({"split": {"group": "y"}}, "'y' is the target"),
        ({"split": {"stratify": True}, "task": "regression"}, "needs classes"),
        ({"split": {"group": "g"}, "weight": "g"}, "cannot be both the weight and a column of the split"),
        ({"weight": "w", "features": ["w"]}, "'w' cannot be a feature"),
        ({"positive_class": "a"}, "positive_class is for the task binary"),
        ({"rare_classes": {"min_rows": 3}, "task": "regression"}, "rare_classes is for the task classification"),
        ({"task": "language_modeling", "text": {"seq_len": 8}, "split": {"group": "g"}}, "split.group cannot be used"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], says: str) -> None:
    spec = {"uri": "x.csv", "task": "classification", "target": "y", **fields}
    if spec["task"] == "language_modeling":
        del spec["target"]
    with pytest.raises(SpecError, match=says):
        parse_spec(DataSpec, spec)


@pytest.mark.parametrize("split", [{}, {"stratify": True}, {"group": "g"}])
def test_the_test_splits_of_all_folds_contain_every_row_once(split: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    y, groups = rng.choice(["a", "b", "c"], 203, p=[0.9, 0.05, 0.05]), rng.integers(0, 40, 203).astype(str)
    tested = np.zeros(203, dtype=int)
    for index in range(5):
        assigned = _assign({**split, "fold": {"index": index, "of": 5}}, y=y, g=groups)
        tested += assigned == TEST
        assert 36 <= (assigned == TEST).sum() <= 45
        assert 14 <= (assigned == VALIDATION).sum() <= 26
        if "group" in split:
            refuse_leak("g", pa.array(groups), assigned)
        if "stratify" in split:
            shares = [Counter(y[assigned == code].tolist())["b"] for code in (TRAIN, TEST)]
            assert abs(shares[1] - (y == "b").sum() / 5) < 1
    assert (tested == 1).all()


def test_folds_in_order_test_each_block_after_the_rows_before_it() -> None:
    for index in range(3):
        assigned = _assign(
            {"order_by": "t", "validation": 0.1, "fold": {"index": index, "of": 3}}, y=["a"] * 40, t=list(range(40))
        )
        stop = 10 * (index + 1)
        assert assigned.tolist() == [TRAIN] * (stop - 4) + [VALIDATION] * 4 + [TEST] * 10 + [-1] * (30 - stop)


@pytest.mark.parametrize("spec", [SplitSpec(stratify="k"), SplitSpec(group="k"), SplitSpec(order_by="k")])
def test_blocks_of_rows_have_the_splits_of_the_whole_table(spec: SplitSpec) -> None:
    column = pa.chunked_array([np.random.default_rng(3).integers(0, 30, 500)])
    keys = split_keys("k", column)
    whole = make_rule(spec, "k", count_keys(keys)).assign(keys, {})
    blocks = [split_keys("k", column.slice(start, 77)) for start in range(0, 500, 77)]
    counted = sum((count_keys(block) for block in reversed(blocks)), Counter())
    rule, before, parts = make_rule(spec, "k", counted), Counter(), []
    for block in blocks:
        parts.append(rule.assign(block, before))
        before.update(count_keys(block))
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert {SPLITS[code] for code in whole} == set(SPLITS)
