import numpy as np
import pytest

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.spec.features import UNKNOWN, CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.data.stored.random_rows import draw_rows

COLUMNS = (
    NumericColumn(name="filled", fill=1.0, shift=100.0, scale=5.0),
    NumericColumn(name="whole", shift=-3.0, scale=0.1),
    NumericColumn(name="huge", scale=1e38),
    CategoricalColumn(name="text", categories=tuple(f"c{i:03d}" for i in range(150)), fill=3),
    CategoricalColumn(name="whole text", categories=("unknown", "x")),
    CategoricalColumn(name="ends", datatype="INT64", categories=(-(2**63), 2**63 - 1)),
    TensorColumn(name="bytes", datatype="UINT8", shape=(2, 3)),
    TensorColumn(name="floats", shape=(3,), fill=0.0, shift=(1.0, 2.0, 3.0), scale=(1.0, 10.0, 100.0)),
)
FEATURES = Features(columns=COLUMNS, task="regression", target="y")


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    first, again, other = draw_rows(FEATURES, 64, 1), draw_rows(FEATURES, 64, 1), draw_rows(FEATURES, 64, 2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_every_category_missing_values_unknown_ones_and_extremes_are_drawn_where_a_client_may_send_them() -> None:
    filled, whole, huge, text, whole_text, ends, pixels, floats = draw_rows(FEATURES, 128, 0)
    assert len({len(column) for column in (filled, whole, huge, text, whole_text, ends, pixels, floats)}) == 1
    assert np.isnan(filled).any()
    assert not np.isnan(whole).any()
    assert np.nanmax(filled) == 150.0
    assert np.nanmin(filled) <= 50.0
    assert np.isfinite(huge).all()
    codes = encode_columns(FEATURES, [filled, whole, huge, text, whole_text, ends, pixels, floats])
    assert set(range(150)) <= set(codes[3].ravel().tolist())
    assert "" in text
    assert "" not in whole_text
    for column in (3, 4, 5):
        assert UNKNOWN in codes[column]
    assert {0, 255} <= set(pixels.ravel().tolist())
    assert np.isnan(floats).any()
    assert [column.dtype for column in (filled, huge, ends, pixels, floats)] == [
        np.float32,
        np.float32,
        np.int64,
        np.uint8,
        np.float32,
    ]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_lone_column_of_any_kind_is_drawn(column) -> None:
    (values,) = draw_rows(Features(columns=(column,), task="regression", target="y"), 2, 0)
    assert len(values) >= 2
    assert values.shape[1:] == (column.shape if column.kind == "tensor" else (1,))
