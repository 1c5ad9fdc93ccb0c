"""Reads untrusted tokenizers and learns vocabularies, with the `tokenizers` library. Independent of data sets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from maas_ray import confined
from maas_ray.data.spec.text import TokenizerSpec
from maas_ray.decoding.tokenizer import Lookup, Tokenizer
from maas_ray.errors import ConfinedError, DataError

UNKNOWN = "<|unknown|>"
"""The token for characters that only the held-out splits contain; part of the vocabulary only if there are any."""
_VOCAB_SIZE = 8192
MAX_FILE_BYTES = 1 << 28
MAX_IDS_PER_CHARACTER = 64
LIMITS = confined.Limits(wall_s=120, cpu_s=20, memory_bytes=1 << 30)
PROBES = (
    "", " ", "a", "The quick brown fox\njumps over 13 lazy dogs.", "a" * 2000 + "!", "1" * 500, " " * 500 + "x", "\n" * 100,
    "".join(map(chr, range(32, 127))), "ä ß é ñ 漢字 かな 한국 עברית العربية हिन्दी", "👍🏽👩‍👩‍👧 e\u0301 \u200b\ufeff\ufffd", "\x00\x01\x7f",
)  # fmt: skip
"""Texts at which some tokenizers fail; tested in addition to the data's own texts."""


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
