"""Every format gives the same table; unreadable files are rejected with their name and a way out."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from maas_ray.data.sources.arrays import tensor_values
from maas_ray.data.sources.table import choose_columns, read_table
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from tests.data.files import ROWS, shared, write


def _spec(uri: Any, **fields: Any) -> DataSpec:
    return DataSpec(**{"uri": str(uri), "task": "binary", "target": "label", **fields})


def _typed() -> pa.Table:
    return csv.read_csv(pa.BufferReader(ROWS.encode()))


def _write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("rows.parquet", parquet.write_table),
        ("rows.feather", feather.write_feather),
        ("rows.arrow", lambda table, path: feather.write_feather(table, path, compression="uncompressed")),
        ("rows.ipc", _write_stream),
    ],
)
def test_typed_formats_are_read_as_they_were_written(tmp_path: Path, name: str, save: Callable[..., None]) -> None:
    save(_typed(), tmp_path / name)
    raw = read_table(_spec(tmp_path / name))
    assert raw.is_typed
    assert raw.table.equals(_typed())


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("rows.csv", ROWS.encode(), {}),
        ("rows.csv.gz", gzip.compress(ROWS.encode()), {}),
        ("rows.tsv", ROWS.replace(",", "\t").encode(), {}),
        ("rows.csv", ROWS.replace(",", ";").encode(), {"delimiter": ";"}),
        ("rows.csv", b"\xef\xbb\xbf" + ROWS.encode(), {}),
        ("rows.csv", ROWS.replace("\n", "\r\n").encode(), {}),
        ("rows", ROWS.encode(), {"format": "csv"}),
    ],
)
def test_csv_is_read_as_text_with_its_missing_values(
    tmp_path: Path, name: str, content: bytes, fields: dict[str, Any]
) -> None:
    raw = read_table(_spec(write(tmp_path / name, content), **fields))
    assert not raw.is_typed
    assert raw.table.column_names == ["age", "city", "height", "member", "label"]
    assert raw.table.column("age").to_pylist()[:3] == ["31", "45", None]
    assert raw.table.column("city").null_count == 1


@pytest.mark.parametrize("uri", ["{0}", "file://{0}", "{0}/*.csv", "{0}/part-?.csv", "{0}/../*/part-[01].csv"])
def test_files_of_a_directory_or_glob_are_read_in_the_order_of_their_names(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    header, *lines = ROWS.splitlines()
    write(folder / "part-1.csv", "\n".join([header, *lines[5:]]))
    write(folder / "part-0.csv", "\n".join([header, *lines[:5]]))
    write(folder / "_SUCCESS", "")
    write(folder / ".part-0.csv.crc", "x")
    whole = read_table(_spec(write(tmp_path / "whole.csv", ROWS))).table
    assert read_table(_spec(uri.format(folder))).table.equals(whole)


def test_a_star_does_not_reach_into_deeper_directories(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "one.csv", ROWS)
    write(tmp_path / "a" / "b" / "two.csv", ROWS)
    assert read_table(_spec(tmp_path / "*" / "*.csv")).table.num_rows == 10


def test_files_on_s3_are_read_through_a_custom_endpoint(s3_endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    header, *lines = ROWS.splitlines()
    client.put_object(Bucket="maas", Key="in/a.csv", Body="\n".join([header, *lines[:4]]).encode())
    client.put_object(Bucket="maas", Key="in/b.csv", Body="\n".join([header, *lines[4:]]).encode())
    client.close()
    for uri in ("s3://maas/in", "s3://maas/in/*.csv"):
        raw = read_table(_spec(uri, endpoint=s3_endpoint, region="us-east-1"))
        assert raw.table.column("age").to_pylist()[3:5] == ["28", "60"]
    with pytest.raises(DataError, match="does not exist"):
        read_table(_spec("s3://maas/in/c.csv", endpoint=s3_endpoint, region="us-east-1"))
    with pytest.raises(DataError, match="cannot list|does not exist"):
        read_table(_spec("s3://no-such-bucket/c.csv", endpoint=s3_endpoint, region="us-east-1"))


def test_named_numpy_arrays_become_columns_and_tensors(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    np.savez(tmp_path / "a.npz", x=x, age=np.array([1, 2, 3, 4]), label=np.array(["a", "b", "a", "b"]))
    table = read_table(_spec(tmp_path / "a.npz")).table
    assert table.column_names == ["x", "age", "label"]
    assert np.array_equal(tensor_values(table.schema.field("x"), table.column("x")), x)
    assert table.column("label").to_pylist() == ["a", "b", "a", "b"]


def test_a_pair_of_numpy_files_is_read_as_x_and_the_target(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(6) % 2)
    table = read_table(_spec(tmp_path / "x.npy", labels_uri=str(tmp_path / "y.npy"))).table
    assert np.array_equal(tensor_values(table.schema.field("x"), table.column("x")), x)
    assert table.column("label").to_pylist() == [0, 1, 0, 1, 0, 1]


def _idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 0x08, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def test_idx_images_find_their_labels(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    write(tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(_idx(images)))
    write(tmp_path / "train-labels-idx1-ubyte.gz", gzip.compress(_idx(np.array([7, 8, 7]))))
    table = read_table(_spec(tmp_path / "train-images-idx3-ubyte.gz")).table
    assert np.array_equal(tensor_values(table.schema.field("image"), table.column("image")), images[:, None])
    assert table.column("label").to_pylist() == [7, 8, 7]


def test_mnist_is_read() -> None:
    table = read_table(_spec(shared("mnist10k/images-idx3-ubyte.gz"))).table
    images = tensor_values(table.schema.field("image"), table.column("image"))
    assert images.shape == (10_000, 1, 28, 28)
    assert images.dtype == np.uint8
    assert table.column("label").to_pylist()[:5] == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("name", "num_rows", "num_columns"),
    [("digits", 1797, 2), ("breast_cancer", 569, 31), ("diabetes", 442, 11), ("wine", 178, 14), ("iris", 150, 5)],
)
def test_packaged_data_sets_are_read(name: str, num_rows: int, num_columns: int) -> None:
    table = read_table(DataSpec(uri=f"sklearn:{name}", task="classification")).table
    assert table.shape == (num_rows, num_columns)


def test_digits_are_those_of_scikit_learn_though_it_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec(uri="sklearn:digits", task="classification")
    found = read_table(spec).table
    monkeypatch.setattr("maas_ray.data.sources.arrays.digits_path", lambda: None)
    loaded = read_table(spec).table
    assert found.equals(loaded)
    assert found.schema.equals(loaded.schema, check_metadata=True)


def test_features_are_read_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ROWS)
    assert read_table(_spec(path, features=("city", "age"))).table.column_names == ["city", "age", "label"]


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        (b"", {}, "is empty"),
        (b"age,label\n", {}, "no rows"),
        (ROWS.encode("utf-16"), {}, "UTF-8"),
        ("name,label\nJosé,1\nAna,0\n".encode("latin-1"), {}, "UTF-8"),
        ("José,label\n1,1\n2,0\n".encode("latin-1"), {}, "UTF-8"),
        ("a\n1\n".encode("utf-16-le"), {}, "UTF-8"),
        (b"a,label\n1,2\n1,2,3\n", {}, "Expected 2 columns, got 3"),
        (b"a,a,label\n1,2,3\n", {}, "several columns named 'a'"),
        (ROWS.encode(), {"target": "lable"}, "did you mean 'label'"),
        (ROWS.encode(), {"features": ("age", "hight")}, "did you mean 'height'"),
        (ROWS.encode(), {"features": ("age", "qqqqqqq")}, "the columns: age, city"),
        (ROWS.encode(), {"split": {"column": "membre"}}, "did you mean 'member'"),
        (ROWS.encode(), {"cleaning": {"drop": ("agee",)}}, "did you mean 'age'"),
        (ROWS.encode(), {"cleaning": {"columns": {"agee": {}}}}, "did you mean 'age'"),
        (ROWS.encode(), {"cleaning": {"columns": {"label": {}}}}, "no column 'label'"),
        (ROWS.encode(), {"features": ("age",), "cleaning": {"drop": ("age",)}}, "no column left"),
        (ROWS.encode(), {"format": "parquet"}, "as a parquet file"),
        (ROWS.encode(), {"format": "arrow"}, "as an Arrow file"),
        (ROWS.encode(), {"format": "idx"}, "labels_uri"),
        (ROWS.encode(), {"format": "numpy"}, "labels_uri"),
        (ROWS.encode(), {"format": "numpy", "labels_uri": "{path}"}, "as a NumPy file"),
        (ROWS.encode(), {"format": "sklearn"}, "names no scikit-learn data set"),
    ],
)
def test_a_file_that_cannot_be_read_reports_why(
    tmp_path: Path, content: bytes, fields: dict[str, Any], says: str
) -> None:
    path = write(tmp_path / "rows.csv", content)
    fields = {key: value.format(path=path) if isinstance(value, str) else value for key, value in fields.items()}
    with pytest.raises(DataError, match=says):
        read_table(_spec(path, **fields))


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        write(path / name, content)
    return path


@pytest.mark.parametrize(
    ("files", "uri", "says"),
    [
        ({}, "none.csv", "does not exist"),
        ({}, "", "names no file"),
        ({"a.csv": b"a,label\n1,2\n"}, "*.parquet", "names no file"),
        ({"a.dat": b"x"}, "a.dat", "set data.format"),
        ({"a.txt": b"x"}, "a.txt", "plain text without columns"),
        ({"a.jsonl": b"{"}, "a.jsonl", "as a file of JSON lines"),
        ({"a.csv": b"a,label\n1,2\n", "b.parquet": b"x"}, "", "several formats"),
        ({"a.csv": b"a,label\n1,2\n", "b.csv": b"b,label\n1,2\n"}, "", "same columns: only one of them has a, b"),
        ({"a.npz": b"x", "b.npz": b"x"}, "", "takes one"),
        ({"a.parquet": b""}, "a.parquet", "is empty"),
        ({"a.parquet": b"PAR1"}, "a.parquet", "as a parquet file"),
        ({"a.arrow": b""}, "a.arrow", "is empty"),
        ({"a.npy": b""}, "a.npy", "is empty"),
        ({"x-images-idx3-ubyte": _idx(np.zeros((2, 3, 3)))}, "x-images-idx3-ubyte", "labels-idx1-ubyte does not exist"),
        (
            {"x-images-idx3-ubyte": _idx(np.zeros((2, 3, 3)))[:-1], "x-labels-idx1-ubyte": _idx(np.zeros(2))},
            "x-images-idx3-ubyte",
            "contains 17 bytes",
        ),
        (
            {"x-images-idx3-ubyte": b"\x89PNG....", "x-labels-idx1-ubyte": _idx(np.zeros(2))},
            "x-images-idx3-ubyte",
            "not an IDX file",
        ),
        (
            {"x-images-idx3-ubyte": _idx(np.zeros((2, 3, 3))), "x-labels-idx1-ubyte": _idx(np.zeros(3))},
            "x-images-idx3-ubyte",
            "different numbers of rows",
        ),
    ],
)
def test_files_that_are_not_there_or_do_not_fit_are_refused(
    tmp_path: Path, files: dict[str, bytes], uri: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        read_table(_spec(_folder(tmp_path, files) / uri))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.array([{"a": 1}, None], dtype=object), "label": np.array([0, 1])}, "cannot read array"),
        ({"x": np.array([1, 2, 3]), "label": np.array([0, 1])}, "different numbers of rows"),
        ({"x": np.float32(3), "label": np.array([0, 1])}, "expected numbers or text per row"),
        ({"x": np.zeros((2, 0)), "label": np.array([0, 1])}, "must contain numbers"),
        ({"x": np.array([["a"], ["b"]]), "label": np.array([0, 1])}, "must contain numbers"),
        ({"x": np.array([1j, 2j]), "label": np.array([0, 1])}, "expected numbers or text"),
        ({"x": np.zeros(0), "label": np.zeros(0)}, "no rows"),
    ],
)
def test_arrays_that_do_not_form_a_table_are_refused_and_python_objects_are_not_unpickled(
    tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=says):
        read_table(_spec(tmp_path / "a.npz"))


def test_an_unknown_scheme_or_packaged_set_is_refused() -> None:
    with pytest.raises(DataError, match="unknown scheme 'ftp'"):
        read_table(_spec("ftp://host/a.csv"))
    with pytest.raises(DataError, match="use one of digits"):
        read_table(_spec("sklearn:faces"))


def test_types_that_differ_between_files_are_joined_or_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"a": [1, 2], "label": [0, 1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"a": [1.5, None], "label": [0, 1]}), tmp_path / "b.parquet")
    assert read_table(_spec(tmp_path)).table.column("a").to_pylist() == [1.0, 2.0, 1.5, None]
    parquet.write_table(pa.table({"a": ["x"], "label": [0]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="do not fit together"):
        read_table(_spec(tmp_path))


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"split": {"group": "city"}}, ["age", "height", "label", "city"]),
        ({"split": {"order_by": "age"}, "weight": "height"}, ["city", "label", "age", "height"]),
        ({"split": {"order_by": "age"}, "features": ["age", "city"]}, ["age", "city", "label"]),
        ({"split": {"stratify": "city"}}, ["age", "city", "height", "label"]),
        ({"split": {"stratify": True}}, ["age", "city", "height", "label"]),
        ({"split": {"stratify": "city"}, "features": ["age"]}, ["age", "label", "city"]),
    ],
)
def test_columns_of_groups_order_and_weights_are_no_features_unless_they_are_named(
    fields: dict[str, Any], columns: list[str]
) -> None:
    assert choose_columns(_spec("rows.csv", **fields), ["age", "city", "height", "label"], "rows.csv") == columns


@pytest.mark.parametrize("fields", [{"weight": "cost"}, {"split": {"group": "town"}}, {"split": {"stratify": "town"}}])
def test_a_column_of_the_split_or_the_weight_that_does_not_exist_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows\.csv has no column '(cost|town)'"):
        choose_columns(_spec("rows.csv", **fields), ["age", "city", "height", "label"], "rows.csv")
