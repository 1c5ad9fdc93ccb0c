"""Documents are read completely for any boundaries of blocks and separators; input that is not text is rejected."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from maas_ray.data.spec.data import DataSpec
from maas_ray.data.text import source
from maas_ray.data.text.source import TextPiece, read_pieces
from maas_ray.errors import DataError
from maas_ray.spec import parse_spec


def _pieces(uri: object, **text: object) -> list[TextPiece]:
    fields = {"uri": str(uri), "task": "language_modeling", "text": {"seq_len": 4, **text}}
    spec = parse_spec(DataSpec, fields)
    assert spec.text is not None
    return list(read_pieces(spec, spec.text))


def _documents(pieces: list[TextPiece]) -> list[str]:
    documents, open_one = [], ""
    for piece in pieces:
        open_one += piece.text
        if piece.ends_document:
            documents.append(open_one)
            open_one = ""
    assert open_one == ""
    return documents


DOCUMENTS = ["one\ntwo", "é" * 40, "\n\n \n", "a b\nc d\n" * 9, "<|", "x"]


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 16])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("separator", ["<|end|>", "|"])
def test_documents_of_a_file_are_those_between_the_separators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, piece: int, block: int, separator: str
) -> None:
    monkeypatch.setattr(source, "PIECE", piece)
    monkeypatch.setattr(source, "BLOCK_BYTES", block)
    documents = [text.replace("|", "/") for text in DOCUMENTS]
    path = tmp_path / "a.txt"
    path.write_text(separator + separator.join(documents) + separator, newline="")
    pieces = _pieces(path, separator=separator)
    assert _documents(pieces) == documents
    assert max(len(one.text) for one in pieces) <= piece + len(separator) + 1


def test_a_long_document_is_cut_only_where_a_word_follows_a_single_line_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "PIECE", 20)
    path = tmp_path / "a.txt"
    path.write_text("one two\n\nthree\n four\nfive six seven\neight nine ten eleven twelve")
    assert [piece.text for piece in _pieces(path)] == [
        "one two\n\nthree\n four",  # no such place before the limit
        "\nfive six seven\n",
        "eight nine ten eleve",
        "n twelve",
    ]


def test_every_format_gives_its_documents_in_the_order_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufefffirst".encode()))
    assert _documents(_pieces(tmp_path)) == ["first", "second"]
    lines = tmp_path / "c.jsonl"
    lines.write_text("\n".join(json.dumps({"body": text}) for text in ["one\ntwo", "", "é"]) + "\n\n")
    assert _documents(_pieces(lines, field="body")) == ["one\ntwo", "é"]
    parquet.write_table(pa.table({"text": ["x", None, "", "y"]}), tmp_path / "d.parquet")
    assert _documents(_pieces(tmp_path / "d.parquet")) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\xfe", "not text in UTF-8"),
        ("a.txt", b"caf\xc3", "not text in UTF-8"),
        ("a.csv", b"a,b\n1,2\n", "is csv"),
        ("a.jsonl", b'{"text": "a"}\nno\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"texts": "a"}', "did you mean 'texts'"),
        ("a.jsonl", b'{"text": 3}', "expected a string"),
        ("a.jsonl", b"[1]", "expected an object"),
        ("a.parquet", b"no", "cannot read"),
    ],
)
def test_input_that_is_not_text_is_rejected(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        _pieces(path)
