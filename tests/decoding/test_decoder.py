"""Encoded values that crash a decoder, or keep it busy, are refused, and the next request is answered."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maas_ray.decoding.decoder import InputDecoder
from maas_ray.decoding.spec import ImageEncoding, TextEncoding
from maas_ray.errors import BadRequest, BundleError, DeadlineExceeded
from tests.cases.test_files_are_bounded import png
from tests.cases.test_tokenizers_run_first_in_a_child_process import BAD, split, tokenizer

TEXT = TextEncoding(length=4, pad=0, tokenizer="0" * 64)


def _elements(*values: bytes | str) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@contextmanager
def _decoder(content: bytes | None = None, **limits: Any) -> Iterator[InputDecoder]:
    limits = {"max_bytes": 1 << 24, **limits}
    if content is None:
        decoder = InputDecoder("image", ImageEncoding(), (1, 2, 2), **limits)
    else:
        decoder = InputDecoder("text", TEXT, (4,), content, **limits)
    try:
        yield decoder
    finally:
        decoder.close()


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 9).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "text", "says"),
    [
        pytest.param(
            BAD["grows at a letter of the texts"],
            "Ω",
            "was not decoded within the limit of 3 s",
            marks=pytest.mark.fault,
        ),
        (tokenizer(pre_tokenizer=split(r"(a|a|aa)+$")), "a" * 2000 + "!", "cannot be decoded|was not decoded"),
    ],
    ids=["busy", "panic"],
)
def test_texts_that_keep_a_tokenizer_busy_cost_their_own_request(content: bytes, text: str, says: str) -> None:
    with _decoder(content, timeout_s=3.0) as decoder:
        decoder.start()
        with pytest.raises(BadRequest, match=f"input 'text' ({says})"):
            decoder.decode(_elements(text), 60)
        assert decoder.decode(_elements("b"), 60).tolist() == [[66, 0, 0, 0]]


def test_a_tokenizer_that_panics_costs_the_requests_with_its_texts() -> None:
    with _decoder(
        tokenizer(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": False})
    ) as decoder:
        with pytest.raises((BadRequest, BundleError)) as caught:
            decoder.start()
            decoder.decode(_elements("xyz"), 60)
        assert len(str(caught.value)) < 2000


def test_content_that_is_no_tokenizer_is_refused_when_the_model_is_loaded() -> None:
    with (
        _decoder(BAD["a list"]) as decoder,
        pytest.raises(BundleError, match="the tokenizer of input 'text' cannot be used"),
    ):
        decoder.start()


@pytest.mark.fault
def test_pictures_that_take_too_long_cost_their_own_request() -> None:
    with _decoder(timeout_s=3.0) as decoder:
        decoder.start()
        with pytest.raises(BadRequest, match=r"input 'image' was not decoded within the limit of 3 s"):
            decoder.decode(_elements(*[_png(8000, 8000)] * 100), 60)
        assert decoder.decode(_elements(_png(2, 2)), 60).tolist() == [[[[9, 9], [9, 9]]]]


def test_a_picture_that_expands_beyond_the_limit_is_refused() -> None:
    with _decoder() as decoder, pytest.raises(BadRequest, match=r"row 1: cannot be decoded: it has 9000 x 9000 pixels"):
        decoder.decode(_elements(_png(2, 2), png(9000, 9000)), 60)


@pytest.mark.fault
def test_the_deadline_of_a_request_ends_its_decoding() -> None:
    with _decoder() as decoder:
        decoder.start()
        with pytest.raises(DeadlineExceeded):
            decoder.decode(_elements(*[_png(8000, 8000)] * 20), 0.2)
        with pytest.raises(DeadlineExceeded):
            decoder.decode(_elements(_png(2, 2)), 0.0)


def test_a_closed_decoder_leaves_no_process() -> None:
    with _decoder() as decoder:
        decoder.start()
    assert decoder.num_idle == 0
