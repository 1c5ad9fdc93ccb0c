"""The tokenizer of a data set: the file that the spec names, or one that is learned from the training split alone."""

from collections.abc import Callable, Iterable, Sequence

from maas_ray.data.files import read_bytes
from maas_ray.data.spec import DataSpec
from maas_ray.data.text.spec import TextSpec
from maas_ray.data.text.tokenizer import UNKNOWN, Tokenizer, learn_tokenizer


def find_tokenizer(
    spec: DataSpec, text: TextSpec, texts: Callable[[], Iterable[tuple[str, str]]], special: Sequence[str]
) -> Tokenizer:
    """Reads or learns the tokenizer.

    Args:
        spec: where a given file is looked for.
        text: which tokenizer.
        texts: gives all (split, text), as often as it is called.
        special: tokens that a learned vocabulary gets beside those of the texts.

    Raises:
        DataError: the file cannot be read, or is no tokenizer.
    """
    own = text.tokenizer
    if own.uri is not None:
        return Tokenizer(read_bytes(spec, own.uri))
    if own.kind != "characters":
        return learn_tokenizer(own, (one for split, one in texts() if split == "train"), special)
    known: set[str] = set()
    others: set[str] = set()
    for split, one in texts():
        (known if split == "train" else others).update(one)
    return learn_tokenizer(own, known, [*([UNKNOWN] if others - known else []), *special])
