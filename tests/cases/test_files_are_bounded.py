"""`.npy` of 2^40, IDX of 255 dimensions, size bombs in npz, gz, csv and parquet (over 40 s) ended in untyped
errors or had no limit. Each is a `DataError`, in little time and within 1 GiB above the imports; legitimate files are
read.
"""

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv, feather, parquet

from maas_ray.client import Tensor
from maas_ray.client.description import ModelDescription
from maas_ray.client.files import read_input_file
from maas_ray.data.sources.table import read_table
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from maas_ray.spec import parse_spec
from tests.support.bounds import bounded

GIB = 1 << 30


def npy(shape: str, descr: str = "'<f8'", body: bytes = b"\0" * 64, version: bytes = b"\x01\x00") -> bytes:
    """A NumPy file with an arbitrary header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + body


def idx(kind: int, shape: list[int], body: bytes = b"") -> bytes:
    return bytes([0, 0, kind, len(shape)]) + b"".join(struct.pack(">I", size) for size in shape) + body


def zeros_gz(size: int, begin: bytes = b"", line: bytes = b"\0" * 1024) -> bytes:
    """`size` bytes of one line, compressed in pieces."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(begin)
        block = line * ((1 << 20) // len(line))
        for _ in range(size // len(block)):
            file.write(block)
    return out.getvalue()


def npz(members: dict[str, bytes], lie: int | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    data = out.getvalue()
    return data.replace(struct.pack("<I", len(next(iter(members.values())))), struct.pack("<I", lie)) if lie else data


def many_rows() -> bytes:
    """2^30 rows of one number, in a parquet file of a few hundred kilobytes."""
    out = io.BytesIO()
    table = pa.table({"x": np.zeros(1 << 20), "target": np.zeros(1 << 20)})
    with parquet.ParquetWriter(out, table.schema, compression="zstd") as writer:
        for _ in range(1 << 6):
            writer.write_table(table)
    return out.getvalue()


def long_texts() -> bytes:
    """A text of 1 MB in each of 100,000 rows: once in the dictionary."""
    out = io.BytesIO()
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(["x" * 1_000_000]))
    table = pa.table({"x": texts, "target": np.zeros(100_000)})
    parquet.write_table(table, out, compression="zstd", store_schema=False)
    return out.getvalue()


def many_keys() -> bytes:
    """A new key in each line: as many columns as rows."""
    return b"".join(b'{"k%d": 1}\n' % number for number in range(60_000))


def compressed_arrow() -> bytes:
    out = io.BytesIO()
    feather.write_feather(pa.table({"x": np.zeros(1 << 27), "target": np.zeros(1 << 27)}), out, compression="zstd")
    return out.getvalue()


def broken_offsets() -> bytes:
    """Arrow's own format, with offsets that point far outside of the values."""
    offsets = pa.py_buffer(np.int32([0, 4, 1 << 30, 5]).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"hello")])
    table = pa.table({"x": texts, "target": [1, 2, 3]})
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG of zeros, made without ever having them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


TARGET = {"labels_uri": "labels.npy", "task": "regression"}
LABELS = {"labels.npy": npy("(8,)")}
FILES: dict[str, Callable[[], tuple[dict[str, bytes], dict[str, Any]]]] = {
    ".npy of 2^40": lambda: ({"a.npy": npy("(1099511627776,)"), **LABELS}, TARGET),
    ".npy of 2^80": lambda: ({"a.npy": npy("(1099511627776, 1099511627776)"), **LABELS}, TARGET),
    ".npy of a negative size": lambda: ({"a.npy": npy("(-8,)"), **LABELS}, TARGET),
    ".npy of two negative sizes": lambda: ({"a.npy": npy("(-1, -8)"), **LABELS}, TARGET),
    ".npy of 100 dimensions": lambda: ({"a.npy": npy("(" + "1, " * 100 + ")"), **LABELS}, TARGET),
    ".npy of empty texts": lambda: ({"a.npy": npy("(1099511627776,)", "'<U0'"), **LABELS}, TARGET),
    ".npy of nothing in many rows": lambda: ({"a.npy": npy("(1099511627776, 0)"), **LABELS}, TARGET),
    ".npy of long texts": lambda: ({"a.npy": npy("(1,)", "'<U536870911'"), **LABELS}, TARGET),
    ".npy of records": lambda: ({"a.npy": npy("(1,)", "[('a', '<f8', (1073741824,))]"), **LABELS}, TARGET),
    ".npy of objects": lambda: ({"a.npy": npy("(8,)", "'|O'"), **LABELS}, TARGET),
    ".npy with a shape that is not a tuple": lambda: ({"a.npy": npy("8"), **LABELS}, TARGET),
    ".npy with a deep header": lambda: ({"a.npy": npy("(" * 900 + ")" * 900), **LABELS}, TARGET),
    ".npy with a header of 1 MB": lambda: ({"a.npy": npy("(8,)" + " " * 1_000_000, version=b"\x02\x00"), **LABELS}, TARGET),
    ".npy of version 3": lambda: ({"a.npy": npy("(1099511627776,)", version=b"\x03\x00"), **LABELS}, TARGET),
    ".npy of version 9": lambda: ({"a.npy": npy("(1099511627776,)", version=b"\x09\x00"), **LABELS}, TARGET),
    "target of 2^40": lambda: ({"a.npy": npy("(8,)"), "labels.npy": npy("(1099511627776,)")}, TARGET),
    "npz bomb": lambda: ({"a.npz": npz({"x.npy": b"\0" * (GIB // 2), "target.npy": b""})}, {}),
    "npz with a wrong size": lambda: ({"a.npz": npz({"x.npy": npy("(1000,)", body=b"\0" * 8000)}, lie=100)}, {}),
    "npz with an array of 2^40": lambda: ({"a.npz": npz({"x.npy": npy("(1099511627776,)"), "target.npy": npy("(8,)")})}, {}),
    "npz with something else": lambda: ({"a.npz": npz({"x.npy": b"hello"})}, {}),
    "npz cut off": lambda: ({"a.npz": npz({"x.npy": npy("(8,)")})[:-10]}, {}),
    "gzip of an npy": lambda: ({"a.npy.gz": zeros_gz(GIB), **LABELS}, {**TARGET, "format": "numpy"}),
    "IDX of 255 dimensions": lambda: ({"a-images-idx3-ubyte": idx(8, [1] * 255, b"\0"), "l": idx(8, [1], b"\0")}, {"labels_uri": "l"}),
    "IDX of 255 empty dimensions": lambda: ({"a-images-idx3-ubyte": idx(8, [0] * 255), "l": idx(8, [0])}, {"labels_uri": "l"}),
    "IDX of 2^96": lambda: ({"a-images-idx3-ubyte": idx(8, [2**32 - 1] * 3), "l": idx(8, [1], b"\0")}, {"labels_uri": "l"}),
    "IDX of nothing times 2^64": lambda: ({"a-images-idx3-ubyte": idx(8, [0, 2**32 - 1, 2**32 - 1]), "l": idx(8, [0])}, {"labels_uri": "l"}),
    "IDX bomb": lambda: ({"a-images-idx3-ubyte.gz": zeros_gz(GIB, idx(8, [1 << 20, 32, 32])), "l": idx(8, [1], b"\0")}, {"labels_uri": "l"}),
    "csv bomb": lambda: ({"a.csv.gz": zeros_gz(GIB, b"x,target\n", b"1,2\n")}, {}),
    "csv bomb of one line": lambda: ({"a.csv.gz": zeros_gz(GIB, b"x,target\n", b"1")}, {}),
    "csv bomb of blank lines": lambda: ({"a.csv.gz": zeros_gz(GIB, b"x,target\n", b"\n")}, {}),
    "csv with 3,000,000 columns": lambda: ({"a.csv": b"a," * 3_000_000 + b"target\n"}, {}),
    "csv with 3,000,000 names": lambda: ({"a.csv": b",".join(b"c%d" % i for i in range(1_500_000)) + b",target\n"}, {}),
    "jsonl bomb": lambda: ({"a.jsonl.gz": zeros_gz(GIB, b"", b'{"x":1}\n')}, {}),
    "jsonl with a key per line": lambda: ({"a.jsonl": many_keys()}, {}),
    "jsonl 100,000 deep": lambda: ({"a.jsonl": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"}, {}),
    "jsonl of objects 100,000 deep": lambda: ({"a.jsonl": b'{"x": ' * 100_000 + b"1" + b"}" * 100_000 + b"\n"}, {}),
    "parquet of 2^26 rows": lambda: ({"a.parquet": many_rows()}, {}),
    "parquet of a long text in many rows": lambda: ({"a.parquet": long_texts()}, {}),
    "parquet cut off": lambda: ({"a.parquet": many_rows()[:-100]}, {}),
    "arrow bomb": lambda: ({"a.arrow": compressed_arrow()}, {}),
    "arrow with offsets outside of it": lambda: ({"a.arrow": broken_offsets()}, {}),
    "arrow that is none": lambda: ({"a.arrow": b"ARROW1\0\0" + random.Random(0).randbytes(100_000)}, {}),
    "image bomb": lambda: ({"cat/a.png": png(30_000, 30_000)}, {"uri": "."}),
    "image bomb that is wide": lambda: ({"cat/a.png": png(1 << 27, 1)}, {"uri": "."}),
    "second image is a bomb": lambda: ({"cat/a.png": png(4, 4), "cat/b.png": png(30_000, 30_000)}, {"uri": "."}),
    "image in another format": lambda: ({"cat/a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, {"uri": "."}),
    "first image makes every row large": lambda: ({"cat/a.png": png(8000, 8000), **{f"cat/b{i}.png": png(2, 2) for i in range(80)}}, {"uri": "."}),
}  # fmt: skip


def read(argument: dict[str, Any], is_warm_up: bool) -> None:
    """What the child does: reads a data set as `prepare` would."""
    if is_warm_up:
        csv.read_csv(io.BytesIO(b"a\n1\n"))
        return
    read_table(parse_spec(DataSpec, argument))


def spec_of(folder: Path, files: dict[str, bytes], fields: dict[str, Any]) -> dict[str, Any]:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    uri = {"uri": str(folder / next(iter(files))), "task": "classification", **fields}
    for key in ("labels_uri", "uri"):
        if key in fields:
            uri[key] = str(folder / fields[key])
    return uri


@pytest.mark.fault
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_a_typed_error_soon_and_in_little_memory(tmp_path: Path, name: str) -> None:
    outcome = bounded(f"{__name__}:read", spec_of(tmp_path, *FILES[name]()))
    assert outcome.error == "DataError", outcome
    assert len(outcome.text) < 10_000
    assert "a." in outcome.text or "labels" in outcome.text or "b" in outcome.text, "it names the file"


SOON = [
    name for name in FILES if not any(word in name for word in ("bomb", "parquet", "arrow", "gzip", "jsonl", "large"))
]


@pytest.mark.parametrize("name", SOON)
def test_a_hostile_header_is_a_typed_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_table(parse_spec(DataSpec, spec_of(tmp_path, *FILES[name]())))
    assert len(str(caught.value)) < 10_000


@pytest.mark.fault
@pytest.mark.parametrize("ending", ["csv.gz", "jsonl.gz", "parquet", "arrow", "npz"])
def test_a_legitimate_file_is_read_once_the_limit_is_raised(tmp_path: Path, ending: str) -> None:
    """96 MiB of zeros: more than is read from a small file, unless the spec raises the limit."""
    num_rows = 6 << 20
    table = {"x": np.zeros(num_rows), "target": np.zeros(num_rows)}
    path = tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez_compressed(path, **table)
    elif ending in ("parquet", "arrow"):
        write = parquet.write_table if ending == "parquet" else feather.write_feather
        write(pa.table(table), path, compression="zstd")
    elif ending == "csv.gz":
        path.write_bytes(zeros_gz(80 << 20, b"x,target\n", b"0,0\n"))
    else:
        path.write_bytes(zeros_gz(80 << 20, b"", b'{"x":0,"target":0} \n' + b" " * 12))
    fields = {"uri": str(path), "task": "regression"}
    with pytest.raises(DataError, match="max_expansion"):
        read_table(parse_spec(DataSpec, fields))
    if ending in ("parquet", "npz"):
        found = read_table(parse_spec(DataSpec, {**fields, "max_expansion": 1e6})).table
        assert found.num_rows == num_rows


def test_images_are_decoded_as_before(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    (tmp_path / "cat").mkdir()
    for ending, options in (("png", {}), ("bmp", {}), ("webp", {"lossless": True})):
        Image.fromarray(pixels).save(tmp_path / "cat" / f"a.{ending}", **options)
    table = read_table(parse_spec(DataSpec, {"uri": str(tmp_path), "task": "classification"})).table
    rows = np.stack(table.column("image").to_numpy()).reshape(3, 3, 5, 7)
    assert all(np.array_equal(row, pixels.transpose(2, 0, 1)) for row in rows)


INPUT = Tensor(name="x", datatype="FP32", shape=(8,))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", npy("(1099511627776, 8)")),
        ("a.npy", npy("(1099511627776,)", "'<U0'")),
        ("a.json", b"[" * 1_000_000),
        ("a.json", b"[{\"x\": " + b"9" * 5000 + b"}]"),
        ("a.csv", b"x\n" + b"1" * 200_000 + b"\n"),
        ("a.csv", b"x\n\0\n"),
        ("a.csv", b",".join(b"c%d" % i for i in range(200_000)) + b"\n1\n"),
    ],
)  # fmt: skip
def test_rows_to_predict_are_bounded_too(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    inputs = [INPUT if name.endswith("npy") else Tensor(name="x", datatype="FP32", shape=())]
    with pytest.raises(DataError) as caught:
        read_input_file(tmp_path / name, ModelDescription(tuple(inputs)))
    assert len(str(caught.value)) < 10_000
