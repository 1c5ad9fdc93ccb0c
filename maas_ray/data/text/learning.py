"""Reads the tokenizer that the spec names, or learns one from the training split alone."""

from collections.abc import Callable, Iterable, Sequence

from maas_ray.data.sources.files import read_bytes
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.text import TextSpec
from maas_ray.data.text.tokenizer import UNKNOWN, learn_tokenizer, read_tokenizer
from maas_ray.decoding.tokenizer import Tokenizer

_SAMPLE_CHARS = 1 << 16


def find_tokenizer(
    spec: DataSpec, text: TextSpec, texts: Callable[[], Iterable[tuple[str, str]]], special: Sequence[str]
) -> Tokenizer:
    """Reads or learns the tokenizer.

    Args:
        spec: data specification with the access options for a given file.
        text: text specification with the tokenizer.
        texts: returns all (split, text) pairs on each call.
        special: special tokens to add to a learned vocabulary.

    Raises:
        DataError: the file cannot be read, or is not a tokenizer.
    """
    own = text.tokenizer
    if own.uri is not None:
        return read_tokenizer(own.uri, read_bytes(spec, own.uri), _sample(one for _, one in texts()))
    if own.kind != "characters":
        return learn_tokenizer(own, (one for split, one in texts() if split == "train"), special)
    known: set[str] = set()
    others: set[str] = set()
    for split, one in texts():
        (known if split == "train" else others).update(one)
    return learn_tokenizer(own, known, [*([UNKNOWN] if others - known else []), *special])


def _sample(texts: Iterable[str]) -> list[str]:
    """The first of the texts."""
    sample: list[str] = []
    left = _SAMPLE_CHARS
    for text in texts:
        sample.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return sample
