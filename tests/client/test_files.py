"""Files of raw rows are read as the training data of the model was."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.client.files import read_input_file
from maas_ray.errors import DataError

AGE = Tensor("age", "FP32", (1,), nullable=True)
SEX = Tensor("sex", "BYTES", (1,), nullable=True)
SIBLINGS = Tensor("siblings", "INT64", (1,), nullable=True, null_value=7)
FLAG = Tensor("flag", "BOOL", (1,), nullable=True, accepts=("FP32",))
IMAGE = Tensor("image", "FP32", (2, 2))
PICTURE = Tensor("image", "UINT8", (1, 2, 2), accepts=("BYTES",), encoding="image")
TEXT = Tensor("text", "INT64", (6,), accepts=("BYTES",), encoding="text")
READER = {"delimiter": ";", "missing_values": ["", "NA"]}


def _read(path: Path, *inputs: Tensor, reader: dict[str, Any] | None = None) -> dict[str, list[Any]]:
    rows = read_input_file(path, ModelDescription(inputs, reader=reader or {}))
    return {name: np.where(_missing(values), None, values).ravel().tolist() for name, values in rows.columns.items()}


def _missing(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


EXPECTED = {"age": [22.5, None, 3], "sex": ["male", "", "N/A"], "siblings": [1, 7, 2], "flag": [1, None, 0]}


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.jsonl", "a.json"])
def test_every_format_gives_the_values_of_training(tmp_path: Path, name: str) -> None:
    text = "sex;age;ignored;siblings;flag\nmale;22.5;x;1;True\nNA;NA;y;NA;NA\nN/A;3;z;2;false\n"
    plain = {
        "age": [22.5, None, 3],
        "sex": ["male", None, "N/A"],
        "siblings": [1, None, 2],
        "flag": [True, None, False],
    }
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name == "a.parquet":
        parquet.write_table(pa.table(plain), path)
    elif name == "a.jsonl":
        pa.table(plain).to_pandas().astype(object).to_json(path, orient="records", lines=True)
    elif name == "a.json":
        pa.table(plain).to_pandas().astype(object).to_json(path, orient="records")
    else:
        path.write_text(text.replace(";", "\t") if name == "a.tsv" else text)
    assert _read(path, AGE, SEX, SIBLINGS, FLAG, reader=READER) == EXPECTED


def test_arrays_and_texts_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(8, dtype=np.float32).reshape(2, 2, 2))
    assert _read(tmp_path / "rows.npy", IMAGE) == {"image": list(range(8))}
    (tmp_path / "texts.csv").write_text('text,y\n"good, really",1\n12,0\n')
    assert _read(tmp_path / "texts.csv", TEXT) == {"text": ["good, really", "12"]}
    with pytest.raises(DataError, match="has 1 missing values"):
        (tmp_path / "empty.csv").write_text("text,y\ngood,1\n,0\n")
        _read(tmp_path / "empty.csv", TEXT)


def test_images_are_sent_as_they_are(tmp_path: Path) -> None:
    for name in ("b.png", "a.bmp", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (3, 3), 9).save(tmp_path / name)
    (tmp_path / "Thumbs.db").write_bytes(b"junk")
    rows = read_input_file(tmp_path, ModelDescription((PICTURE,)))
    assert rows.names == ("a.bmp", "b.png", "deep/c.png")
    assert rows.columns["image"].tolist() == [(tmp_path / name).read_bytes() for name in rows.names]
    one = read_input_file(tmp_path / "b.png", ModelDescription((PICTURE,)))
    assert one.names == ("b.png",)
    with pytest.raises(DataError, match=r"it does not decode image files"):
        read_input_file(tmp_path / "b.png", ModelDescription((IMAGE,)))


def test_numbers_that_training_could_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age\n1\n?\nold\n")
    rows = read_input_file(tmp_path / "a.csv", ModelDescription((AGE,), reader={"delimiter": ","}))
    assert rows.num_unconvertible == {"age": 2}
    assert np.isnan(rows.columns["age"][1:]).all()


def test_large_rows_are_divided_into_requests(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((130, 2, 2), np.float32))
    rows = read_input_file(tmp_path / "rows.npy", ModelDescription((IMAGE,)))
    assert [len(batch["image"]) for batch in rows.batches()] == [64, 64, 2]
    np.save(tmp_path / "large.npy", np.zeros((3, 1 << 20), np.float32))
    large = read_input_file(tmp_path / "large.npy", ModelDescription((Tensor("x", "FP32", (1 << 20,)),)))
    assert [len(batch["x"]) for batch in large.batches()] == [1, 2]


PLAIN = Tensor("age", "FP32", (1,))
"""Of a model whose training data had no missing values."""


@pytest.mark.parametrize(
    ("name", "content", "inputs", "says"),
    [
        ("a.csv", b"sex\nmale\n", [AGE], "lacks age, required by the model; columns found: sex"),
        ("a.csv", b"age\nold\n", [PLAIN], "a.csv: column 'age' has 1 values that are no numbers, such as 'old'"),
        ("a.csv", b"age;x\n1;2\nNA;2\n", [PLAIN], "column 'age' has 1 missing values, for which the model has no"),
        ("a.csv", b"siblings\nmany\n", [SIBLINGS], "column 'siblings' must contain integers"),
        ("a.csv", b"age\n", [AGE], "no rows"),
        ("a.csv", b"age\n\xff\n", [AGE], "not text in UTF-8"),
        ("a.csv", b"image\n1\n", [IMAGE], "the model needs [2, 2] per row"),
        ("a.json", b"{", [AGE], "not JSON"),
        ("a.json", b'{"age": 1}', [AGE], "list of objects"),
        ("a.npy", b"junk", [IMAGE], "not an .npy file"),
        ("a.npy", b"", [AGE, SEX], "this model has 2"),
        ("a.xyz", b"", [AGE], "unknown extension"),
        ("missing.csv", None, [AGE], "does not exist"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: bytes | None, inputs: list[Tensor], says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        _read(tmp_path / name, *inputs, reader=READER)
    assert says in str(caught.value)


def test_options_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age\n1\n")
    with pytest.raises(DataError, match="this version does not know"):
        _read(tmp_path / "a.csv", AGE, reader={"dialect": "excel"})


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="plain numbers"):
        _read(tmp_path / "a.npy", IMAGE)
