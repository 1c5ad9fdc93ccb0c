"""Classes with few rows become one class."""

from typing import Any

import pyarrow as pa
import pytest

from maas_ray.data.spec.data import DataSpec
from maas_ray.data.table.rare_classes import count_merged, find_rare, merge_rare
from maas_ray.data.table.split_rules import count_keys
from maas_ray.data.table.target import cast_target, class_names
from maas_ray.errors import DataError
from maas_ray.spec import parse_spec


def _spec(**rule: Any) -> DataSpec:
    return parse_spec(DataSpec, {"uri": "x.csv", "task": "classification", "target": "y", "rare_classes": rule})


def test_rare_classes_are_merged_and_counted() -> None:
    spec = _spec(min_rows=3)
    target = cast_target("y", pa.chunked_array([[*"aaaabbbbccd", None]]), "classification")
    rare = find_rare(spec, count_keys(target.values))
    assert rare == {"c", "d"}
    assert count_merged(target, rare) == {"c": 2, "d": 1}
    merged = merge_rare(spec, target, rare)
    assert merged.values.to_pylist() == [*"aaaabbbb", "other", "other", "other", ""]
    assert merged.missing.tolist() == target.missing.tolist()


def test_rare_classes_can_join_an_existing_class() -> None:
    assert find_rare(_spec(min_rows=3, merge_into="a"), {"a": 50, "b": 4, "c": 1}) == {"c"}


@pytest.mark.parametrize(
    ("counts", "rule", "says"),
    [
        ({"a": 50, "b": 1, "c": 1}, {"min_rows": 3}, r"the merged class 'other' \('b', 'c'\) has 2 rows, fewer than"),
        ({"a": 1, "b": 1, "c": 1}, {"min_rows": 3}, "no class of the target 'y' has 3 rows"),
    ],
)
def test_a_merge_that_helps_nothing_is_refused(counts: dict[str, int], rule: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        find_rare(_spec(**rule), counts)


def test_the_positive_class_is_the_last_one() -> None:
    values = pa.array(["legit", "fraud", "legit"])
    assert class_names("y", values, "binary") == ("fraud", "legit")
    assert class_names("y", values, "binary", "fraud") == ("legit", "fraud")
    with pytest.raises(DataError, match="has no class 'Fraud' in the training split; its classes: 'fraud', 'legit'"):
        class_names("y", values, "binary", "Fraud")
