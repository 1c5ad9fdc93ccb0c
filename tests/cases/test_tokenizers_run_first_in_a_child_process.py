"""A tokenizer.json that panics, aborts or runs over 40 s ended the process. It is tried in a child process."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models

from maas_ray.data.spec.data import DataSpec
from maas_ray.data.text.learning import find_tokenizer
from maas_ray.data.text.tokenizer import read_tokenizer
from maas_ray.decoding.tokenizer import MAX_VOCAB_SIZE
from maas_ray.errors import DataError
from maas_ray.spec import parse_spec

SOON_S = 100
"""Generous for a busy machine: the limit is 20 s of CPU; without one, they never ended."""


def tokenizer(**parts: Any) -> bytes:
    """A tokenizer of single letters with other parts."""
    letters = {chr(code): code - 32 for code in range(32, 127)}
    document = json.loads(Engine(models.BPE(vocab=letters, merges=[])).to_str())
    return json.dumps({**document, **parts}).encode()


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


GROWS = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 1000)] * 4}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}
BAD = {
    "grows at each letter": tokenizer(normalizer=GROWS),
    "grows at a letter of the texts": tokenizer(
        normalizer={"type": "Sequence", "normalizers": [replace({"String": "Ω"}, "Ω" * 1000)] * 4}
    ),
    "a pattern of exponential time": tokenizer(pre_tokenizer=split(r"(a|a|aa)+$")),
    "token ids of 32 bits": tokenizer(model={"type": "WordLevel", "vocab": {"a": 2**32 - 2, "b": 0}, "unk_token": "b"}),
    "unknown token outside": tokenizer(model={**UNIGRAM, "unk_id": 7}),
    "no vocabulary": tokenizer(model={**UNIGRAM, "vocab": []}),
    "a score that is none": tokenizer(model=UNIGRAM).replace(b"0.0", b"1e999"),
    "a character map of noise": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}),
    "nested deep": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "normalizers nested deep": tokenizer(normalizer={"type": "Sequence", "normalizers": []}).replace(
        b'"normalizers": []',
        b'"normalizers": [' + b'{"type": "Sequence", "normalizers": [' * 5000 + b"]}" * 5000 + b"]",
    ),
    "not JSON": b"hello",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "a list": b"[]",
}


SLOW = ("grows at each letter",)
"""Takes its child's time until the limit of memory."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.fault if name in SLOW else ())
        for name in BAD
        if name != "grows at a letter of the texts"
    ],
)
def test_a_hostile_tokenizer_is_a_typed_error_soon(name: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(DataError) as caught:
        read_tokenizer("a/tokenizer.json", BAD[name], ["Ω and aaa"])
    assert time.monotonic() - started_s < SOON_S
    assert len(str(caught.value)) < 2000


def test_the_texts_that_it_is_for_are_tried_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(BAD["grows at a letter of the texts"])
    (tmp_path / "a.txt").write_text("The letter Ω.")
    text = {"seq_len": 4, "tokenizer": {"kind": "file", "uri": str(tmp_path / "tokenizer.json")}}
    fields = {"uri": str(tmp_path / "a.txt"), "task": "language_modeling", "text": text}
    spec = parse_spec(DataSpec, fields)
    assert spec.text is not None
    with pytest.raises(DataError, match=r"tokenizer\.json as a tokenizer\.json"):
        find_tokenizer(spec, spec.text, lambda: [("train", "The letter Ω.")], [])
    assert find_tokenizer(spec, spec.text, lambda: [("train", "No such letter.")], []).vocab_size == 95


def test_a_tokenizer_that_can_be_used_is_read() -> None:
    found = read_tokenizer("tokenizer.json", tokenizer(), ["hello"])
    assert found.decode(found.encode(["hello"])[0]) == "hello" or found.vocab_size == 95
    assert found.vocab_size < MAX_VOCAB_SIZE
