"""Encodes text as token ids and decodes them, with the `tokenizers` library: in training and in replicas.

A tokenizer is represented by its JSON file. Text is always plain text: a special token that is spelled out in it is
encoded as its letters.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Engine

from maas_ray.decoding.words import Words, is_by_words
from maas_ray.errors import DataError

MAX_VOCAB_SIZE = 1 << 22
_TEXTS_AT_ONCE = 1024

Lookup = Callable[[str], NDArray[np.int64]]


class Tokenizer:
    """A tokenizer, read from its JSON file.

    Args:
        content: content of the file.
        lookup: faster function from text to token ids that gives the tokenizer's results; None: the library encodes.

    Raises:
        DataError: the content is not a tokenizer's JSON.
    """

    def __init__(self, content: bytes, lookup: Lookup | None = None) -> None:
        try:
            self._engine = Engine.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"cannot read it as a tokenizer.json: {error}") from error
        self._engine.encode_special_tokens = True
        self._engine.no_padding()
        self._engine.no_truncation()
        self._lookup = lookup
        self.content = content
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1)
        """Token ids are below this number."""
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(
                f"the tokenizer has token ids up to {self.vocab_size - 1}; the limit is {MAX_VOCAB_SIZE - 1}"
            )
        self._words = Words(self._engine) if lookup is None and is_by_words(content) else None
        self.is_fast = lookup is not None
        """Whether encoding is about as fast as reading."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The token ids of each text, without special tokens."""
        if self._lookup is not None:
            return [self._lookup(text) for text in texts]
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        found = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self._engine.decode([int(token_id) for token_id in token_ids], skip_special_tokens=False)
        return text

    def token_id(self, token: str, field: str) -> int:
        """The id of a special token.

        Args:
            token: the token as spelled in the vocabulary.
            field: the field of TokenizerSpec that names it.

        Raises:
            DataError: the vocabulary has no such token.
        """
        token_id = self._engine.token_to_id(token)
        if token_id is None:
            raise DataError(
                f"the tokenizer has no token {token!r}; set data.text.tokenizer.{field} to one of its tokens, or add it"
            )
        return int(token_id)


def encode_rows(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, pad: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The first token ids of each text, padded.

    Args:
        tokenizer: the tokenizer.
        texts: N texts.
        length: tokens per row.
        pad: token id that pads shorter texts.

    Returns:
        Token ids int32 [N, length], and the number of tokens of each whole text, int64 [N].
    """
    rows = np.full((len(texts), length), pad, dtype=np.int32)
    lengths = np.zeros(len(texts), dtype=np.int64)
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        for row, token_ids in enumerate(tokenizer.encode(texts[first : first + _TEXTS_AT_ONCE]), start=first):
            rows[row, : len(token_ids)] = token_ids[:length]
            lengths[row] = len(token_ids)
    return rows, lengths
