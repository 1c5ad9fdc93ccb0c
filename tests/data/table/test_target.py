"""Class names and codes, and rejection of invalid targets."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maas_ray.data.table.target import cast_target, class_names, encode_target
from maas_ray.errors import DataError


def _cast(values: Any, task: str = "classification", kind: pa.DataType | None = None):
    return cast_target("y", pa.chunked_array([pa.array(values, kind)]), task)


@pytest.mark.parametrize(
    ("values", "labels", "codes"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
    ],
)
def test_classes_are_coded_in_the_order_of_their_names(values: list, labels: tuple, codes: list[int]) -> None:
    target = _cast(values)
    assert class_names("y", target.values, "binary") == labels
    encoded = encode_target("y", target.values, labels, "train")
    assert encoded.dtype == np.int64
    assert encoded.tolist() == codes


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("values", [[1, None, 2], [1.0, float("nan"), 2.0], ["1", "", "2"]])
def test_rows_without_a_target_are_marked(task: str, values: list) -> None:
    assert _cast(values, task).missing.tolist() == [False, True, False]


def test_a_number_that_cannot_be_read_is_a_missing_target() -> None:
    target = _cast(["1.5", "x", None], "regression")
    assert target.missing.tolist() == [False, True, True]
    assert target.num_unconvertible == 1
    assert encode_target("y", target.values, None, "train").dtype == np.float32


@pytest.mark.parametrize(
    ("values", "task", "kind", "says"),
    [
        ([None, None], "classification", pa.string(), "no row of 2 has a class"),
        (["a", "b"], "regression", None, "no row of 2 has a number in the target 'y', 2 rows contain"),
        ([0.5, 1.0], "classification", None, "fractions"),
        ([[1], [2]], "classification", None, "a list per row"),
    ],
)
def test_invalid_targets_are_rejected(values: list, task: str, kind: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        _cast(values, task, kind)


def test_a_single_class_or_too_many_for_binary_are_refused() -> None:
    with pytest.raises(DataError, match="single class 'a'"):
        class_names("y", pa.array(["a", "a"]), "classification")
    with pytest.raises(DataError, match=r"3 classes \(a, b, c\)"):
        class_names("y", pa.array(["a", "b", "c"]), "binary")
    assert class_names("y", pa.array(["a", "b", "c"]), "classification") == ("a", "b", "c")


def test_a_class_that_training_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match="test split contains classes of the target 'y' .* 'c'"):
        encode_target("y", pa.array(["a", "c"]), ("a", "b"), "test")
