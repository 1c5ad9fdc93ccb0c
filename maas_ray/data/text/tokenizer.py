"""Encodes text as token ids and decodes them, with the `tokenizers` library. Independent of data sets.

A tokenizer is represented by its JSON file. Text is always plain text: a special token that is spelled out in it is
encoded as its letters.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from maas_ray import confined
from maas_ray.data.spec.text import TokenizerSpec
from maas_ray.data.text.words import Words, is_by_words
from maas_ray.errors import ConfinedError, DataError

UNKNOWN = "<|unknown|>"
"""The token for characters that only the held-out splits contain; part of the vocabulary only if there are any."""
_VOCAB_SIZE = 8192
MAX_VOCAB_SIZE = 1 << 22
MAX_FILE_BYTES = 1 << 28
MAX_IDS_PER_CHARACTER = 64
LIMITS = confined.Limits(wall_s=120, cpu_s=20, memory_bytes=1 << 30)
PROBES = (
    "", " ", "a", "The quick brown fox\njumps over 13 lazy dogs.", "a" * 2000 + "!", "1" * 500, " " * 500 + "x", "\n" * 100,
    "".join(map(chr, range(32, 127))), "ä ß é ñ 漢字 かな 한국 עברית العربية हिन्दी", "👍🏽👩‍👩‍👧 e\u0301 \u200b\ufeff\ufffd", "\x00\x01\x7f",
)  # fmt: skip
"""Texts at which some tokenizers fail; tested in addition to the data's own texts."""

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


def read_tokenizer(where: str, content: bytes, sample: Sequence[str]) -> Tokenizer:
    """Reads an untrusted tokenizer after it has encoded a sample in a child process.

    The library is native code that panics, aborts or runs forever on some files, at the first text or before it.

    Args:
        where: name of the file for messages.
        content: content of the file.
        sample: some of the data's texts.

    Raises:
        DataError: the content is not a tokenizer's JSON, or the tokenizer cannot be used.
    """
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{where} has {len(content)} bytes; the limit for a tokenizer is {MAX_FILE_BYTES} bytes")
    try:
        confined.call(f"{__name__}:try_out", {"texts": [*PROBES, *sample]}, [content], LIMITS, what=where)
    except ConfinedError as error:
        raise DataError(f"cannot use {where} as a tokenizer.json: {error}") from error
    return Tokenizer(content)


def try_out(payload: Mapping[str, Any], blobs: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """The child's side: reads the tokenizer, encodes the texts one by one, and decodes the results.

    Raises:
        DataError: the content is not a tokenizer's JSON, or the tokenizer gives too many token ids.
    """
    tokenizer = Tokenizer(bytes(blobs[0]))
    for text in payload["texts"]:
        (token_ids,) = tokenizer.encode([text])
        if len(token_ids) > MAX_IDS_PER_CHARACTER * max(1, len(text)):
            raise DataError(
                f"the tokenizer encodes {len(text)} characters as {len(token_ids)} token ids, which is too many"
            )
        tokenizer.decode(token_ids[:1024])
    return {}, []


def learn_tokenizer(spec: TokenizerSpec, texts: Iterable[str], special: Sequence[str]) -> Tokenizer:
    """Builds a vocabulary; the same texts give the same file.

    Args:
        spec: kind of the tokenizer, other than `file`.
        texts: texts of the training split.
        special: special tokens, appended in this order.
    """
    lookup: Lookup | None = None
    if spec.kind == "characters":
        characters = sorted({character for text in texts for character in set(text)})
        engine, lookup = _characters(characters, UNKNOWN in special), _character_lookup(characters, UNKNOWN in special)
    elif spec.kind == "bytes":
        engine, lookup = _bytes(), _utf8
    else:
        engine = _byte_bpe((spec.vocab_size or _VOCAB_SIZE) - len(special), texts)
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return Tokenizer(engine.to_str().encode(), lookup)


def _characters(characters: list[str], has_unknown: bool) -> Engine:
    # A byte-pair model without merges: much faster here than a word model whose words are single characters.
    vocabulary = {character: token_id for token_id, character in enumerate(characters)}
    if has_unknown:
        vocabulary[UNKNOWN] = len(vocabulary)
    engine = Engine(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN if has_unknown else None))
    engine.decoder = decoders.Fuse()
    return engine


def _character_lookup(characters: list[str], has_unknown: bool) -> Lookup:
    known = np.frombuffer("".join(characters).encode("utf-32-le"), dtype="<u4")
    token_ids = np.full(0x110000, len(characters) if has_unknown else -1, dtype=np.int64)
    token_ids[known] = np.arange(len(characters))

    def lookup(text: str) -> NDArray[np.int64]:
        found: NDArray[np.int64] = token_ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
        if not has_unknown and (found < 0).any():
            raise DataError(
                f"the text contains {text[int(found.argmin())]!r}, a character that is not in the tokenizer's "
                "vocabulary"
            )
        return found

    return lookup


def _utf8(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def _bytes() -> Engine:
    """A tokenizer whose token ids are the bytes; its model represents bytes as GPT-2 does, as printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    engine = Engine(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    return engine


def _byte_bpe(vocab_size: int, texts: Iterable[str]) -> Engine:
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    return engine
