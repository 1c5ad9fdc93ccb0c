"""Footers of parquet files and schemas of Arrow files, parsed in a child; equal to pyarrow's; bad files are named."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet
from pyarrow.fs import LocalFileSystem

from maas_ray.data.large import footers
from maas_ray.data.large.footers import read_footers
from maas_ray.data.sources.files import File
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from maas_ray.spec import parse_spec

TABLE = pa.table({
    "a": np.arange(1000, dtype=np.int32),
    "b": [f"text {i}" for i in range(1000)],
    "c": pa.array([[1.0, 2.0]] * 1000, pa.list_(pa.float32(), 2)),
    "d": pa.array(["x", "y"] * 500).dictionary_encode(),
})  # fmt: skip


def spec_of(folder: Path) -> DataSpec:
    return parse_spec(DataSpec, {"uri": str(folder), "target": "a", "task": "regression"})


def read(folder: Path, kind: str) -> list[footers.Footer | None]:
    files = [File(str(path), path.stat().st_size) for path in sorted(folder.iterdir())]
    return read_footers(spec_of(folder), LocalFileSystem(), files, kind)


def varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def wide(num_columns: int) -> bytes:
    """A parquet file of many columns and no rows: its footer in Thrift's compact protocol (parquet-format/parquet.thrift)."""
    root = b"\x35\x00\x18\x01r\x15" + varint(2 * num_columns) + b"\x00"  # required, its name, the number of children
    column = b"\x15\x02\x25\x00\x18\x01x\x00"  # INT32, required, its name
    schema = b"\xfc" + varint(num_columns + 1) + root + column * num_columns
    footer = b"\x15\x02\x19" + schema + b"\x16\x00\x19\x0c\x00"  # version 1, schema, no rows, no row groups
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_parquet_footers_equal_those_of_pyarrow(tmp_path: Path) -> None:
    for number, rows in enumerate((1000, 300, 7)):
        parquet.write_table(TABLE, tmp_path / f"{number}.parquet", row_group_size=rows)
    found = read(tmp_path, "parquet")
    for path, footer in zip(sorted(tmp_path.iterdir()), found, strict=True):
        assert footer is not None
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        assert footer.schema.equals(file.schema_arrow, check_metadata=True)
        assert footer.groups == tuple((group.num_rows, group.total_byte_size) for group in groups)


@pytest.mark.parametrize("form", ["file", "stream", "feather"])
def test_arrow_schemas_equal_those_of_pyarrow(tmp_path: Path, form: str) -> None:
    path, table = tmp_path / "a.arrow", TABLE if form != "feather" else TABLE.drop(["c", "d"])
    if form == "feather":
        feather.write_feather(table, path)
    else:
        open_ = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with open_(path, table.schema) as writer:
            writer.write_table(table)
    (footer,) = read(tmp_path, "arrow")
    assert footer is not None
    assert footer.schema.equals(table.schema)


@pytest.mark.parametrize("content", [b"FEA1" + bytes(60) + b"FEA1", b"\xff\xff\xff\xff\x10\0\0\0" + bytes(16), b"no"])
def test_a_file_without_a_leading_schema_is_read_as_a_whole(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.arrow").write_bytes(content)
    assert read(tmp_path, "arrow") == [None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not parquet at all", "it does not end in a footer"),
        (b"PAR1", "it does not end in a footer"),
        (b"PAR1" + (1 << 30).to_bytes(4, "little") + b"PAR1", "it does not end in a footer"),
        (b"PAR1" + bytes(40) + (40).to_bytes(4, "little") + b"PAR1", "as a parquet file"),
    ],
)
def test_a_file_that_is_not_parquet_is_named_among_others(tmp_path: Path, content: bytes, message: str) -> None:
    parquet.write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, "parquet")
    assert "b.parquet" in str(caught.value)


def test_a_footer_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footers, "MAX_FOOTER_BYTES", 100)
    parquet.write_table(TABLE, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a.parquet .* its footer has \d+ bytes, the limit is 100; write fewer columns"
    ):
        read(tmp_path, "parquet")


def test_many_columns_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(wide(2000))
    (footer,) = read(tmp_path, "parquet")
    assert footer is not None
    assert len(footer.schema) == 2000
    assert footer.groups == ()


@pytest.mark.fault
def test_a_footer_that_takes_a_gigabyte_is_named_and_costs_this_process_nothing(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(wide(900_000))
    parquet.write_table(TABLE, tmp_path / "c.parquet")
    since = time.monotonic()
    with pytest.raises(DataError, match=r"b\.parquet as a parquet file: .*memory"):
        read(tmp_path, "parquet")
    assert time.monotonic() - since < 120
