"""What is encoded comes back, byte for byte; the same text gives the same file; special tokens come from no text."""

import subprocess
import sys

import pytest

from maas_ray.data.text.spec import TokenizerSpec
from maas_ray.data.text.tokenizer import UNKNOWN, Tokenizer, learn_tokenizer
from maas_ray.errors import DataError

TEXTS = ["To be, or not to be:\n\n that is the question. \u00e9\U0001f600\x00\t<|endoftext|>", "  Aye\r\n"]
END = "<|endoftext|>"


@pytest.mark.parametrize("kind", ["byte_bpe", "characters", "bytes"])
def test_text_comes_back_and_special_tokens_come_from_no_text(kind: str) -> None:
    tokenizer = learn_tokenizer(TokenizerSpec(kind=kind), TEXTS, [END, "<|mask|>"])
    codes = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(one) for one in codes] == TEXTS
    assert tokenizer.code(END, "end_of_text") == tokenizer.vocab_size - 2
    assert all(one.max() < tokenizer.vocab_size - 2 for one in codes)
    assert [one.tolist() for one in Tokenizer(tokenizer.content).encode(TEXTS)] == [one.tolist() for one in codes]


def test_bytes_are_their_own_codes_and_characters_are_numbered_in_order() -> None:
    codes = learn_tokenizer(TokenizerSpec(kind="bytes"), [], []).encode(["".join(map(chr, range(300)))])[0]
    assert codes.tolist() == list("".join(map(chr, range(300))).encode())
    assert learn_tokenizer(TokenizerSpec(kind="characters"), ["cab", "d"], []).encode(["abcd"])[0].tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_what_is_looked_up_is_what_the_file_says(kind: str) -> None:
    texts = ["".join(map(chr, [*range(0xD800), *range(0xE000, 0x10100)])), "", "ab\0\U0001f600"]
    special = [UNKNOWN, END] if kind == "characters" else [END]
    tokenizer = learn_tokenizer(
        TokenizerSpec(kind=kind), ["ab\n\U0001f600", *(texts if kind == "bytes" else ())], special
    )
    looked_up, encoded = tokenizer.encode(texts), Tokenizer(tokenizer.content).encode(texts)
    assert [codes.tolist() for codes in looked_up] == [codes.tolist() for codes in encoded]


def test_a_character_that_training_lacks_is_unknown() -> None:
    tokenizer = learn_tokenizer(TokenizerSpec(kind="characters"), ["ab"], [UNKNOWN, END])
    assert tokenizer.encode(["axb"])[0].tolist() == [0, 2, 1]
    assert (tokenizer.vocab_size, tokenizer.code(END, "end_of_text")) == (4, 3)


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


def test_what_is_no_tokenizer_or_lacks_a_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer(b"{}")
    with pytest.raises(DataError, match="'x', a character that the tokenizer does not know"):
        learn_tokenizer(TokenizerSpec(kind="characters"), ["ab"], [END]).encode(["axb"])
    with pytest.raises(DataError, match=r"data\.text\.tokenizer\.mask"):
        learn_tokenizer(TokenizerSpec(kind="bytes"), [], []).code("[MASK]", "mask")
