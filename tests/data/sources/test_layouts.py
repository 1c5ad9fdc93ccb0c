"""Columns in paths, lists as vectors, and files that are not read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from maas_ray.data.sources.files import count_unread, list_files
from maas_ray.data.sources.table import read_table
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError


def _spec(uri: Any, **fields: Any) -> DataSpec:
    return DataSpec(**{"uri": str(uri), "task": "binary", "target": "y", **fields})


def _save(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({**columns, "y": ["u", "v"]}), path)


@pytest.mark.parametrize(("glob", "names"), [("", ["a", "year", "place"]), ("**/*.parquet", ["a", "year", "place"])])
def test_columns_in_the_folders_names_are_read(tmp_path: Path, glob: str, names: list[str]) -> None:
    for year in (2023, 2024):
        for place in ("Rome", "__HIVE_DEFAULT_PARTITION__"):
            _save(tmp_path / f"year={year}" / f"place={place}" / "0.parquet", a=[1, 2])
    table = read_table(_spec(tmp_path / glob)).table
    assert table.column_names == [*names, "y"]
    assert table.schema.field("year").type == pa.int64()
    assert sorted(set(table.column("year").to_pylist())) == [2023, 2024]
    assert {None, "Rome"} == set(table.column("place").to_pylist())


def test_folders_of_different_columns_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "a=1" / "0.parquet", x=[1, 2])
    _save(tmp_path / "b=1" / "0.parquet", x=[1, 2])
    with pytest.raises(DataError, match="different partition columns, b and a"):
        read_table(_spec(tmp_path))


def test_an_index_of_pandas_is_left_out(tmp_path: Path) -> None:
    _save(tmp_path / "0.parquet", a=[1, 2], __index_level_0__=[7, 8])
    raw = read_table(_spec(tmp_path / "0.parquet"))
    assert (raw.table.column_names, raw.left_out) == (["a", "y"], {"__index_level_0__": "an index of pandas"})


def test_lists_of_one_length_are_vectors(tmp_path: Path) -> None:
    _save(tmp_path / "0.parquet", v=[[1.0, 2.0], [3.0, 4.0]])
    table = read_table(_spec(tmp_path / "0.parquet")).table
    assert table.schema.field("v").type == pa.list_(pa.float64(), 2)
    assert table.column("v").to_pylist() == [[1, 2], [3, 4]]
    for wrong, says in (([[1.0], [2.0, 3.0]], "1 to 2 values"), ([[1.0], None], "1 rows without a list")):
        _save(tmp_path / "0.parquet", v=wrong)
        with pytest.raises(DataError, match=says):
            read_table(_spec(tmp_path / "0.parquet"))


def test_files_in_inner_folders_are_counted(tmp_path: Path) -> None:
    _save(tmp_path / "0.parquet", a=[1, 2])
    _save(tmp_path / "old" / "0.parquet", a=[1, 2])
    _save(tmp_path / "_hidden" / "0.parquet", a=[1, 2])
    spec = _spec(tmp_path)
    assert count_unread(spec, list_files(spec)) == {str(tmp_path / "old"): "1 files in 1 inner folders"}
    assert count_unread(_spec(tmp_path / "old"), list_files(_spec(tmp_path / "old"))) == {}
