"""Tokenizers: lossless for every byte, equal text gives equal files, and text never gives special tokens."""

import json
import random
import subprocess
import sys

import pytest
import tokenizers

from maas_ray.data.spec.text import TokenizerSpec
from maas_ray.data.text.tokenizer import UNKNOWN, learn_tokenizer
from maas_ray.decoding import words
from maas_ray.decoding.tokenizer import Tokenizer
from maas_ray.errors import DataError

TEXTS = ["To be, or not to be:\n\n that is the question. \u00e9\U0001f600\x00\t<|endoftext|>", "  Aye\r\n"]
END = "<|endoftext|>"


@pytest.mark.parametrize("kind", ["byte_bpe", "characters", "bytes"])
def test_text_survives_a_round_trip_and_never_encodes_to_special_tokens(kind: str) -> None:
    tokenizer = learn_tokenizer(TokenizerSpec(kind=kind), TEXTS, [END, "<|mask|>"])
    token_ids = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(one) for one in token_ids] == TEXTS
    assert tokenizer.token_id(END, "end_of_text") == tokenizer.vocab_size - 2
    assert all(one.max() < tokenizer.vocab_size - 2 for one in token_ids)
    assert [one.tolist() for one in Tokenizer(tokenizer.content).encode(TEXTS)] == [one.tolist() for one in token_ids]


def test_bytes_are_their_own_codes_and_characters_are_numbered_in_order() -> None:
    token_ids = learn_tokenizer(TokenizerSpec(kind="bytes"), [], []).encode(["".join(map(chr, range(300)))])[0]
    assert token_ids.tolist() == list("".join(map(chr, range(300))).encode())
    assert learn_tokenizer(TokenizerSpec(kind="characters"), ["cab", "d"], []).encode(["abcd"])[0].tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_the_lookup_equals_the_tokenizer_file(kind: str) -> None:
    texts = ["".join(map(chr, [*range(0xD800), *range(0xE000, 0x10100)])), "", "ab\0\U0001f600"]
    special = [UNKNOWN, END] if kind == "characters" else [END]
    tokenizer = learn_tokenizer(
        TokenizerSpec(kind=kind), ["ab\n\U0001f600", *(texts if kind == "bytes" else ())], special
    )
    looked_up, encoded = tokenizer.encode(texts), Tokenizer(tokenizer.content).encode(texts)
    assert [token_ids.tolist() for token_ids in looked_up] == [token_ids.tolist() for token_ids in encoded]


def test_a_character_that_training_lacks_is_unknown() -> None:
    tokenizer = learn_tokenizer(TokenizerSpec(kind="characters"), ["ab"], [UNKNOWN, END])
    assert tokenizer.encode(["axb"])[0].tolist() == [0, 2, 1]
    assert (tokenizer.vocab_size, tokenizer.token_id(END, "end_of_text")) == (4, 3)


def test_another_process_learns_the_same_pairs() -> None:
    script = (
        "from maas_ray.data.text.tokenizer import *; import hashlib, pydoc_data.topics as t;"
        "texts = [str(v) for v in list(t.topics.values())[:12]];"
        "print(hashlib.sha256(learn_tokenizer(TokenizerSpec(vocab_size=400), texts, []).content).hexdigest())"
    )
    found = {subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).stdout for _ in range(2)}
    assert len(found) == 1
    assert len(found.pop().strip()) == 64


def test_a_vocabulary_is_no_larger_than_asked() -> None:
    assert learn_tokenizer(TokenizerSpec(vocab_size=300), TEXTS * 50, [END]).vocab_size == 300


def test_a_file_without_a_tokenizer_or_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"as a tokenizer\.json"):
        Tokenizer(b"{}")
    with pytest.raises(DataError, match="'x', a character that is not in the tokenizer"):
        learn_tokenizer(TokenizerSpec(kind="characters"), ["ab"], [END]).encode(["axb"])
    with pytest.raises(DataError, match=r"data\.text\.tokenizer\.mask"):
        learn_tokenizer(TokenizerSpec(kind="bytes"), [], []).token_id("[MASK]", "mask")


def _scrambled(seed: int, num_pieces: int) -> str:
    """Text with every way in which words, numbers, signs, blanks and line ends can meet."""
    rng = random.Random(seed)
    pieces = [
        "the",
        "The",
        "to-be",
        "I'll",
        "it's",
        "'s",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "12",
        "3.5",
        "!?",
        "\x1c",
        "\0",
    ]
    pieces += [
        "\u00e9t\u00e9",
        "\u6f22\u5b57",
        "\u2019",
        "\u00a0",
        "\u2028",
        "\x85",
        "\U0001f600",
        END,
        "_a_",
        "x" * 1500,
    ]
    weights = [9] * 16 + [1] * (len(pieces) - 16)
    return "".join(rng.choices(pieces, weights, k=num_pieces))


def test_words_that_are_looked_up_have_the_codes_that_the_library_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = learn_tokenizer(TokenizerSpec(vocab_size=400), [_scrambled(0, 3000)], [END])
    monkeypatch.setattr(words, "MAX_WORDS", 300)
    texts = [_scrambled(seed, size) for seed, size in enumerate([0, 1, 2, 5, 30, 300, 3000, 3000])]
    texts += ["".join(filter(str.isascii, text)) for text in texts]
    library = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    library.encode_special_tokens = True  # the text of a special token is text
    plain = library.encode_batch_fast(texts, add_special_tokens=False)
    assert words.is_by_words(tokenizer.content)
    for text, found, expected in zip(texts, tokenizer.encode(texts), plain, strict=True):
        assert found.tolist() == expected.ids, text


@pytest.mark.parametrize("change", ["normalizer", "prefix", "dropout", "plain token"])
def test_a_tokenizer_whose_codes_depend_on_more_than_a_word_is_left_to_the_library(change: str) -> None:
    body = json.loads(learn_tokenizer(TokenizerSpec(vocab_size=400), TEXTS, [END]).content)
    assert words.is_by_words(json.dumps(body).encode())
    if change == "normalizer":
        body["normalizer"] = {"type": "Lowercase"}
    elif change == "prefix":
        body["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "dropout":
        body["model"]["dropout"] = 0.1
    else:
        body["added_tokens"][0]["special"] = False
    assert not words.is_by_words(json.dumps(body).encode())
