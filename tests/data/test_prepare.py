"""Preparing files: held-out rows have no influence, equal input gives equal digests, bad input is rejected."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from sklearn import datasets
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.prepare import prepare
from maas_ray.data.spec.data import SPLITS, DataSpec
from maas_ray.data.spec.features import CategoricalColumn, NumericColumn
from maas_ray.data.stored.dataset import Dataset, Split
from maas_ray.data.table.split import assign_rows
from maas_ray.errors import DataError, SpecError
from maas_ray.spec import parse_spec
from maas_ray.store.manifest import list_committed
from maas_ray.store.objects import ObstoreStore
from tests.data.files import ROWS, shared, write

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data 2.60 warns of a default of its own context.
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle. is deprecated:DeprecationWarning"),
]

FILL = {
    "numeric": {"missing": "median"},
    "categorical": {"missing": "most_frequent"},
    "columns": {"member": {"scaling": "none"}},
}


def _spec(uri: Any, **fields: Any) -> DataSpec:
    return parse_spec(DataSpec, {"uri": str(uri), "task": "binary", "target": "label", "cleaning": FILL, **fields})


def _blank(text: str, column: int) -> str:
    header, *lines = text.splitlines()
    rows = [line.split(",") for line in lines]
    return "\n".join([header, *(",".join([*row[:column], "", *row[column + 1 :]]) for row in rows)])


def test_a_csv_file_becomes_a_committed_data_set(store: ObstoreStore, tmp_path: Path) -> None:
    dataset = prepare(_spec(write(tmp_path / "rows.csv", ROWS)), store)
    assert dataset.num_rows == {"train": 7, "validation": 1, "test": 2}
    assert dataset.features.labels == ("no", "yes")
    assert [column.name for column in dataset.features.columns] == ["age", "city", "height", "member"]
    assert [column.kind for column in dataset.features.columns] == ["numeric", "categorical", "numeric", "numeric"]
    assert dataset.report == {
        "rows_read": 10,
        "rows_dropped": {"target_missing": 0, "value_missing": 0},
        "columns": {
            "age": {"missing": 1, "unconvertible": 0},
            "city": {"missing": 1, "unconvertible": 0},
            "height": {"missing": 1, "unconvertible": 0},
            "member": {"missing": 0, "unconvertible": 0},
        },
        "target": {"missing": 0, "unconvertible": 0},
    }
    raw = ROWS.splitlines()[1:]
    assigned = assign_rows(_spec("x").split, 10)
    for code, name in enumerate(SPLITS):
        split = dataset.read(name)
        expected = [raw[i].split(",") for i in np.flatnonzero(assigned == code)]
        ages = [None if np.isnan(age) else str(int(age)) for age in split.columns[0][:, 0]]
        assert ages == [row[0] or None for row in expected]
        assert split.columns[1][:, 0].tolist() == [row[1] for row in expected]
        assert split.columns[3][:, 0].tolist() == [float(row[3] == "true") for row in expected]
        assert split.target.tolist() == [float(row[4] == "yes") for row in expected]
        assert split.target.dtype == np.float32


def test_without_a_cluster_the_way_to_one_is_named(tmp_path: Path) -> None:
    program = (
        "from maas_ray.data.prepare import prepare; from maas_ray.data.spec.data import DataSpec; "
        "from maas_ray.store.objects import open_store; import sys; "
        "prepare(DataSpec(uri='sklearn:iris', task='classification'), open_store(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"file://{tmp_path}/store"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "ClusterError: Ray is not connected" in done.stderr
    assert "maas-ray up" in done.stderr


def test_the_same_data_has_one_digest_in_every_format_that_has_its_types(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    first = prepare(_spec(write(tmp_path / "rows.csv", ROWS)), file_store)
    again = prepare(_spec(write(tmp_path / "copy.csv", ROWS)), file_store)
    assert again.digest == first.digest
    assert again.committed.parts == first.committed.parts
    typed = csv.read_csv(tmp_path / "rows.csv")
    parquet.write_table(typed.slice(0, 4), tmp_path / "a.parquet")
    parquet.write_table(typed.slice(4), tmp_path / "b.parquet")
    assert prepare(_spec(tmp_path / "*.parquet"), file_store).digest == first.digest
    assert prepare(_spec(tmp_path / "rows.csv", split={"seed": 1}), file_store).digest != first.digest
    assert prepare(_spec(write(tmp_path / "c.csv", ROWS.replace("31", "32"))), file_store).digest != first.digest
    assert len(list_committed(file_store, "datasets")) == 3


def _changed(row: int) -> str:
    """The ten rows with one that differs in every column except the label."""
    header, *lines = ROWS.splitlines()
    lines[row] = ",".join(["-1000", "Nowhere", "99.5", "true", lines[row].split(",")[-1]])
    return "\n".join([header, *lines])


def test_only_training_rows_change_the_fitted_features(file_store: ObstoreStore, tmp_path: Path) -> None:
    features = prepare(_spec(write(tmp_path / "rows.csv", ROWS)), file_store).features
    assigned = assign_rows(_spec("x").split, 10)
    for row, split in ((int(np.flatnonzero(assigned == code)[0]), SPLITS[code]) for code in range(3)):
        found = prepare(_spec(write(tmp_path / "changed.csv", _changed(row))), file_store).features
        assert (found == features) == (split != "train")


def test_cleaning_equals_a_scikit_learn_pipeline_on_the_same_training_rows(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    bunch = datasets.load_breast_cancer()
    x = bunch.data.astype(np.float32)
    x[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
    np.savez(tmp_path / "a.npz", target=bunch.target, **{f"c{i:02d}": x[:, i] for i in range(x.shape[1])})
    for missing in ("mean", "median", "most_frequent"):
        spec = {"uri": str(tmp_path / "a.npz"), "task": "binary", "cleaning": {"numeric": {"missing": missing}}}
        spec["features"] = [f"c{i:02d}" for i in range(x.shape[1])]
        dataset = prepare(parse_spec(DataSpec, spec), file_store)
        assigned = assign_rows(DataSpec(**spec).split, len(x))
        pipeline = make_pipeline(SimpleImputer(strategy=missing), StandardScaler())
        pipeline.fit(x[assigned == 0].astype(np.float64))
        fills = [column.fill for column in dataset.features.columns]
        np.testing.assert_allclose(fills, pipeline[0].statistics_, rtol=1e-7)
        np.testing.assert_allclose([c.shift for c in dataset.features.columns], pipeline[1].mean_, rtol=1e-7)
        np.testing.assert_allclose([c.scale for c in dataset.features.columns], pipeline[1].scale_, rtol=1e-6)


def test_rows_without_a_target_or_value_are_left_out_and_counted(file_store: ObstoreStore, tmp_path: Path) -> None:
    text = ROWS.replace("28,,1.91,true,no", "28,,1.91,true,").replace("39,Oslo,1.55", "abc,Oslo,1.55")
    spec = _spec(
        write(tmp_path / "rows.csv", text),
        cleaning={
            "numeric": {"missing": "mean"},
            "columns": {"height": {"missing": "drop_row"}, "age": {"cast": "number"}},
            "categorical": {"missing": "drop_row"},
        },
        split={"validation": 0, "test": 0.3},
        max_unconvertible=0.2,
    )
    dataset = prepare(spec, file_store)
    assert dataset.report["rows_dropped"] == {"target_missing": 1, "value_missing": 1}
    assert dataset.report["columns"]["age"] == {"missing": 1, "unconvertible": 1}
    assert dataset.report["target"] == {"missing": 1, "unconvertible": 0}
    assert sum(dataset.num_rows.values()) == 8
    assert dataset.num_rows["validation"] == 0
    age, city, height, _ = dataset.features.columns
    assert age.fill is not None
    assert (height.fill, city.fill) == (None, None)


def test_a_column_can_name_the_split_and_is_not_a_feature(file_store: ObstoreStore, tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": [1.0, 2.0, 3.0, 400.0],
            "part": ["train", "train", "validation", "test"],
            "label": [0.5, 1.5, 2.5, 3.5],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    spec = _spec(tmp_path / "a.parquet", task="regression", split={"column": "part"}, cleaning={})
    dataset = prepare(spec, file_store)
    assert dataset.features.columns == (NumericColumn(name="a", shift=1.5, scale=0.5),)
    assert [dataset.read(split).target.tolist() for split in SPLITS] == [[0.5, 1.5], [2.5], [3.5]]


def test_casts_and_encodings_of_single_columns_are_followed(file_store: ObstoreStore, tmp_path: Path) -> None:
    columns = {
        "age": {"cast": "category", "missing": "constant", "constant": "unknown", "encoding": "ordinal"},
        "member": {"cast": "category"},
        "height": {"missing": "constant", "constant": 1.5, "scaling": "min_max"},
        "city": {"missing": "constant", "constant": "Nowhere"},
    }
    dataset = prepare(_spec(write(tmp_path / "rows.csv", ROWS), cleaning={"columns": columns}), file_store)
    age, city, height, member = dataset.features.columns
    assert isinstance(age, CategoricalColumn)
    assert isinstance(city, CategoricalColumn)
    assert isinstance(member, CategoricalColumn)
    assert age.categories[age.fill] == "unknown"
    assert age.encoding == "ordinal"
    assert "Nowhere" in city.categories
    assert member.categories == ("false", "true")
    train = dataset.read("train").columns[2]
    filled = np.where(np.isnan(train), np.float32(1.5), train).astype(np.float64)
    assert (height.fill, height.shift, height.scale) == (1.5, filled.min(), filled.max() - filled.min())
    for name in SPLITS:
        codes = encode_columns(dataset.features, dataset.read(name).columns)
        assert codes[3].dtype == np.int64


@pytest.mark.parametrize(
    ("change", "fields", "says"),
    [
        (
            lambda text: text,
            {"cleaning": {}},
            "column 'age' has 1 missing values in 10 rows; set cleaning.numeric.missing",
        ),
        (lambda text: text, {"cleaning": {"drop": ["age", "height"]}}, "column 'city' has 1 missing"),
        (lambda text: _blank(text, 0), {}, "column 'age' has no value in any of 10 rows"),
        (lambda text: _blank(text, 1), {}, "column 'city' has no value in any of 10 rows"),
        (lambda text: _blank(text, 4), {}, "no row of 10 has a class in the target 'label'"),
        (
            lambda text: text,
            {"cleaning": {"columns": {"city": {"cast": "number"}}}},
            "column 'city': 9 of 9 values are not convertible to a number",
        ),
        (lambda text: text.replace("yes", "no"), {}, "single class 'no'"),
        (lambda text: text.replace("60,Lima,,false,yes", "60,Lima,,false,maybe"), {}, "task: binary needs exactly two"),
        (lambda text: "\n".join(text.splitlines()[:3]), {}, "2 rows are too few"),
        (
            lambda text: text,
            {"cleaning": {**FILL, "columns": {"city": {"missing": "mean"}}}},
            "cleaning.columns.city.missing: 'mean' does not fit a categorical column",
        ),
        (
            lambda text: text,
            {"cleaning": {**FILL, "columns": {"city": {"scaling": "none"}}}},
            "city.scaling does not fit",
        ),
        (
            lambda text: text,
            {"cleaning": {**FILL, "columns": {"age": {"encoding": "ordinal"}}}},
            "age.encoding does not",
        ),
        (
            lambda text: text,
            {"cleaning": {**FILL, "columns": {"age": {"missing": "constant", "constant": "x"}}}},
            "'x' is not a number",
        ),
        (
            lambda text: text,
            {"cleaning": {**FILL, "columns": {"city": {"missing": "constant", "constant": ""}}}},
            "must not be empty",
        ),
        (
            lambda text: text,
            {"cleaning": {**FILL, "max_categories": 2}},
            "column 'city' has 3 categories; the limit is 2",
        ),
        (lambda text: text, {"task": "regression"}, "10 rows contain a value that is not a number"),
    ],
)
def test_data_that_cannot_be_cleaned_reports_why(
    file_store: ObstoreStore, tmp_path: Path, change: Callable[[str], str], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        prepare(_spec(write(tmp_path / "rows.csv", change(ROWS)), **fields), file_store)
    assert list_committed(file_store, "datasets") == []


def test_a_split_that_loses_all_its_rows_is_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    table = pa.table({"a": [1.0, 2.0, None], "part": ["train", "train", "test"], "label": [0.5, 1.5, 2.5]})
    parquet.write_table(table, tmp_path / "a.parquet")
    cleaning = {"numeric": {"missing": "drop_row"}}
    spec = _spec(tmp_path / "a.parquet", task="regression", split={"column": "part"}, cleaning=cleaning)
    with pytest.raises(DataError, match=r"the test split of .* has no rows left \(1 before"):
        prepare(spec, file_store)


def test_a_class_that_only_a_held_out_split_has_is_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    held_out = int(np.flatnonzero(assign_rows(_spec("x").split, 10) == SPLITS.index("test"))[0])
    header, *lines = ROWS.splitlines()
    lines[held_out] = lines[held_out].rsplit(",", 1)[0] + ",rare"
    path = write(tmp_path / "rows.csv", "\n".join([header, *lines]))
    with pytest.raises(DataError, match="test split contains classes .* 'rare'"):
        prepare(_spec(path, task="classification"), file_store)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"split": {"validation": 0.5, "test": 0.5}}, "leave nothing for training"),
        ({"features": ["age", "age"]}, "names age more than once"),
        ({"features": []}, "features is empty"),
        ({"features": ["label"]}, "'label' cannot be a feature"),
        ({"split": {"column": "label"}}, "both the target and the split column"),
        ({"cleaning": {"numeric": {"missing": "constant"}}}, "belong together"),
        ({"cleaning": {"categorical": {"constant": "x"}}}, "belong together"),
        ({"cleaning": {"columns": {"age": {"mising": "mean"}}}}, "did you mean 'missing'"),
        ({"fromat": "csv"}, "did you mean 'format'"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        _spec("x", **fields)


def _rows_of(split: Split) -> int:
    return len(split.target)


def _consistent(dataset: Dataset) -> None:
    for name in SPLITS:
        split = dataset.read(name)
        assert _rows_of(split) == dataset.num_rows[name]
        for values in encode_columns(dataset.features, split.columns):
            assert len(values) == dataset.num_rows[name]


def test_packaged_digits_become_images(file_store: ObstoreStore) -> None:
    dataset = prepare(DataSpec(uri="sklearn:digits", task="classification"), file_store)
    _consistent(dataset)
    assert dataset.features.row.shape == (1, 8, 8)
    assert dataset.features.labels == tuple("0123456789")
    bunch = datasets.load_digits()
    rows = np.flatnonzero(assign_rows(DataSpec(uri="x", task="binary").split, 1797) == 0)
    train = dataset.read("train")
    np.testing.assert_array_equal(train.columns[0][:, 0], bunch.images[rows])
    np.testing.assert_array_equal(train.target, bunch.target[rows])
    (column,) = dataset.features.columns
    np.testing.assert_allclose(column.shift, bunch.images[rows].mean(), rtol=1e-12)


def test_passengers_with_missing_values_and_text_are_prepared(file_store: ObstoreStore) -> None:
    spec = _spec(
        shared("titanic.csv"),
        target="survived",
        cleaning={
            "numeric": {"missing": "median"},
            "categorical": {"missing": "most_frequent"},
            "columns": {"pclass": {"cast": "category"}, "deck": {"missing": "constant", "constant": "unknown"}},
            "drop": ["alive"],
        },
    )
    dataset = prepare(spec, file_store)
    _consistent(dataset)
    assert dataset.report["columns"]["age"]["missing"] == 177
    assert dataset.report["columns"]["deck"]["missing"] == 688
    pclass = dataset.features.columns[0]
    assert (pclass.datatype, pclass.categories) == ("INT64", (1, 2, 3))


def test_diamonds_are_prepared_for_regression(file_store: ObstoreStore) -> None:
    dataset = prepare(DataSpec(uri=shared("diamonds.csv"), task="regression", target="price"), file_store)
    _consistent(dataset)
    assert sum(dataset.num_rows.values()) == 53_940
    assert dataset.read("test").target.dtype == np.float32
