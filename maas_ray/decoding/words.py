"""Byte-level byte-pair encoding with a cache of words; returns the same token ids as the `tokenizers` library.

The library encodes about 1 MB/s per CPU, and spends nearly all of this time on words that it has already encoded: its
own cache contains 10,000 words. Such a tokenizer splits text into words before it merges bytes, so the token ids of a
text are those of its words. The pattern that splits is GPT-2's; its character classes are the same in Python only for
ASCII, so the library encodes all other lines.
"""

import json
import re
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Engine

MAX_WORDS = 1 << 18
"""Maximum number of cached words, about 300 bytes each; beyond it, the cache is cleared."""
MAX_WORD = 1 << 10
"""Maximum characters of a cached word."""
_WORD = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    re.ASCII,
)
_CUT = re.compile(r"(?<=\S\n)(?=\S)")


def is_by_words(content: bytes) -> bool:
    """Whether the token ids of a tokenizer.json depend on each of GPT-2's words alone."""
    body = json.loads(content)
    model, cut = body.get("model") or {}, body.get("pre_tokenizer") or {}
    return (
        (model.get("type"), model.get("dropout")) == ("BPE", None)
        and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex", True)) == ("ByteLevel", False, True)
        and body.get("normalizer") is None
        and all(token["special"] for token in body.get("added_tokens", ()))
    )


class Words:
    """Encodes text.

    Args:
        engine: the library's tokenizer, for which `is_by_words` is true and which treats special tokens as text.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> NDArray[np.int64]:
        """The token ids of a text, without special tokens."""
        if text.isascii():
            return self._look_up(text)
        # The pattern also splits after a newline before a word, so lines are encoded separately.
        stretches = ("".join(lines) for _, lines in groupby(_CUT.split(text), str.isascii))
        parts = [self._look_up(one) if one.isascii() else self._ask(one) for one in stretches]
        return np.concatenate(parts)

    def _ask(self, text: str) -> NDArray[np.int64]:
        (found,) = self._engine.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(found.ids, dtype=np.int64)

    def _look_up(self, text: str) -> NDArray[np.int64]:
        words = _WORD.findall(text)
        known = self._known
        if new := list(set(words) - known.keys()):
            if len(known) > MAX_WORDS:
                known.clear()
                new = list(set(words))
            if max(map(len, new)) > MAX_WORD:
                return self._ask(text)
            found = self._engine.encode_batch_fast(new, add_special_tokens=False)
            known.update(zip(new, (one.ids for one in found), strict=True))
        return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), dtype=np.int64)
