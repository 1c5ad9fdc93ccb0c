"""Encoding of categories, including unknown and missing ones."""

import numpy as np
import pytest

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.spec.features import UNKNOWN, CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.errors import DataError


def _features(*columns) -> Features:
    return Features(columns=columns, task="regression", target="y")


def _text(*values: str) -> np.ndarray:
    return np.array(values, dtype=object).reshape(-1, 1)


def test_known_unknown_and_missing_categories_get_their_codes() -> None:
    city = CategoricalColumn(name="city", categories=("Lima", "Oslo", "Rome"), fill=1)
    klass = CategoricalColumn(name="class", datatype="INT64", categories=(1, 3))
    columns = [_text("Rome", "", "Bonn", "Lima"), np.array([[3], [1], [2], [-5]])]
    city_codes, class_codes = encode_columns(_features(city, klass), columns)
    assert city_codes.dtype == class_codes.dtype == np.int64
    assert city_codes.tolist() == [[2], [1], [UNKNOWN], [0]]
    assert class_codes.tolist() == [[1], [0], [UNKNOWN], [UNKNOWN]]


def test_other_columns_pass_unchanged() -> None:
    columns = [np.float32([[1.5], [np.nan]]), np.zeros((2, 3, 3), np.uint8)]
    features = _features(NumericColumn(name="a"), TensorColumn(name="b", datatype="UINT8", shape=(3, 3)))
    for before, after in zip(columns, encode_columns(features, columns), strict=True):
        assert after is before


def test_a_missing_category_without_a_fill_is_refused() -> None:
    with pytest.raises(DataError, match="column 'city' has 1 missing"):
        encode_columns(_features(CategoricalColumn(name="city", categories=("a",))), [_text("a", "")])


def test_another_number_of_columns_is_refused() -> None:
    with pytest.raises(DataError, match="got 0 columns; expected 1"):
        encode_columns(_features(NumericColumn(name="a")), [])
