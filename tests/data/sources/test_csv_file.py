"""Options for reading csv files, and messages that name the right one."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from maas_ray.data.sources.table import read_table
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from tests.data.files import write

PLAIN = "a,b,y\n1,größe,u\n2,two,v\n"


def _spec(uri: Any, **fields: Any) -> DataSpec:
    return DataSpec(**{"uri": str(uri), "task": "binary", "target": "y", **fields})


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (PLAIN.encode("latin-1"), {"encoding": "latin-1"}),
        (PLAIN.encode("utf-16"), {"encoding": "utf-16"}),
        (PLAIN.partition("\n")[2], {"column_names": ["a", "b", "y"]}),
        ("# one\n" + PLAIN + "# two, with a comma\n", {"comment": "#"}),
        (PLAIN.replace(",", ",  "), {"skip_initial_space": True}),
        ('a, "b", y\n1, "größe", u\n2, "two", v\n', {"skip_initial_space": True}),
        (("# größe\n" + PLAIN).encode("cp1252"), {"comment": "#", "encoding": "cp1252"}),
        (PLAIN.replace(",", "|"), {"delimiter": "|"}),
    ],
)
def test_the_same_rows_are_read(tmp_path: Path, content: str | bytes, fields: dict[str, Any]) -> None:
    table = read_table(_spec(write(tmp_path / "a.csv", content), **fields)).table
    assert table.to_pydict() == {"a": ["1", "2"], "b": ["größe", "two"], "y": ["u", "v"]}


def test_values_inside_quotes_are_not_changed_by_the_filter(tmp_path: Path) -> None:
    text = 'a,y\n"x,  y",u\n"line\n# no comment",v\n'
    table = read_table(_spec(write(tmp_path / "a.csv", text), comment="#", skip_initial_space=True)).table
    assert table.column("a").to_pylist() == ["x,  y", "line\n# no comment"]


def test_quotes_after_a_backslash_are_refused_or_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,y\n"he said \\"hi\\"",u\n"b",v\n')
    with pytest.raises(DataError, match=r"data.escape"):
        read_table(_spec(path))
    assert read_table(_spec(path, escape="\\")).table.column("a").to_pylist() == ['he said "hi"', "b"]
    doubled = write(tmp_path / "b.csv", 'a,y\n"C:\\",u\n"x""y",v\n')
    assert read_table(_spec(doubled)).table.column("a").to_pylist() == ["C:\\", 'x"y']


def test_a_zip_archive_of_one_file_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("__MACOSX/a.csv", "x")
        archive.writestr("folder/a.csv", PLAIN)
    assert read_table(_spec(tmp_path / "a.csv.zip")).table.num_rows == 2
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.csv", PLAIN)
        archive.writestr("b.csv", PLAIN)
    with pytest.raises(DataError, match="contains 2 files"):
        read_table(_spec(tmp_path / "b.zip"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (PLAIN.replace(",", ";"), "set data.delimiter: ';'"),
        (PLAIN.replace(",", "\t"), r"set data.delimiter: '\\t'"),
        ("'a'\t'y'\n1\t2\n", r"set data.delimiter: '\\t'"),
        (PLAIN.replace(",", ", "), "data.skip_initial_space"),
        (PLAIN.encode("latin-1"), "set data.encoding"),
        ("a,,y\n1,2,u\n", "column 2 of 3 has no name"),
    ],
)
def test_a_message_names_the_option(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_table(_spec(write(tmp_path / "a.csv", content)))


@pytest.mark.parametrize("name", ["", '""', "Unnamed: 0"])
def test_row_names_are_left_out_and_told_unless_they_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.csv", f"{name},a,y\n1,5,u\n2,6,v\n")
    raw = read_table(_spec(path))
    assert raw.table.column_names == ["a", "y"]
    assert list(raw.left_out.values()) == ["the first column has no name: row names of pandas or R"]
    if name == "Unnamed: 0":
        assert read_table(_spec(path, features=[name, "a"])).table.column_names == [name, "a", "y"]
