"""Reads text as numbers with the options of `ReaderOptions`, and proposes options for text that is not one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.spec.reader import TRUTH, ReaderOptions

MAX_EXAMPLES = 5
_MAX_EXAMPLE_CHARS = 40
_PLACEHOLDERS = frozenset(
    {"?", "-", "--", ".", "..", "*", "none", "<na>", "na", "n/a", "nan", "null", "nil", "missing", "unknown"}
)
_CURRENCY = "$€£¥₹%"
_NEAR = r"^[+-]?[$€£¥₹]?\s?(\d{1,3}([., ]\d{3})+|\d+)([.,]\d+)?\s?[$€£¥₹%]?$"


@dataclass(frozen=True)
class Doubles:
    """Numbers read from text."""

    values: NDArray[np.float64]
    """[N]; NaN where the text is missing or not a finite number."""
    failed: NDArray[np.bool_]
    """[N]: whether there is a text that is not a finite number."""
    examples: tuple[str, ...] = ()
    """The first of these texts, distinct and shortened."""


def read_numbers(column: pa.ChunkedArray, reader: ReaderOptions) -> Doubles:
    """Reads text as float64; spaces around it are ignored, and an empty text is missing.

    Args:
        column: text.
        reader: decimal and thousands separators, and affixes.
    """
    trimmed = pc.utf8_trim_whitespace(column)
    trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    if reader.decimal == "." and reader.thousands is None and not reader.affixes:
        try:
            values = trimmed.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        except pa.ArrowInvalid:
            pass  # at least one text is no plain number
        else:
            if not np.isinf(values).any():
                return Doubles(values, np.zeros(len(values), dtype=np.bool_))
    chunk = trimmed.combine_chunks() if isinstance(trimmed, pa.ChunkedArray) else trimmed
    encoded = pc.dictionary_encode(chunk)
    texts = encoded.dictionary.to_pylist()
    plain = _Plain(reader)
    parsed = np.array([*(plain.number(text) for text in texts), np.nan])
    is_failed = np.isnan(parsed)
    is_failed[-1] = False
    is_failed[:-1] &= np.array([text.lower() != "nan" for text in texts], dtype=np.bool_)
    places = pc.fill_null(encoded.indices, len(texts)).to_numpy(zero_copy_only=False)
    examples = tuple(short(texts[place]) for place in np.flatnonzero(is_failed)[:MAX_EXAMPLES])
    return Doubles(parsed[places], is_failed[places], examples)


def short(text: str) -> str:
    """A text for a message."""
    return text if len(text) <= _MAX_EXAMPLE_CHARS else f"{text[:_MAX_EXAMPLE_CHARS]}…"


def named(examples: Iterable[str]) -> str:
    """Examples for a message: `'?', '-'`."""
    return ", ".join(map(repr, examples))


def propose(examples: Iterable[str], reader: ReaderOptions, where: str | None = None) -> str:
    """The fields of the spec with which texts that are not numbers would become numbers or missing values.

    Args:
        examples: such texts.
        reader: the options with which they were read.
        where: path of the column's policy, such as `cleaning.columns.hp`; None: it is the target.
    """
    found = list(examples)
    ways = []
    missing = [text for text in found if text.lower() in _PLACEHOLDERS]
    if missing:
        ways.append(f"add {', '.join(map(repr, missing))} to data.missing_values")
    others = [text for text in found if text not in missing]
    marks = sorted({mark for text in others for mark in _CURRENCY if mark in text})
    affixes = (*reader.affixes, *marks)
    for decimal, thousands in ((".", None), (".", ","), (",", None), (",", "."), (".", " "), (",", " ")):
        changed = reader.model_copy(update={"decimal": decimal, "thousands": thousands, "affixes": affixes})
        plain = _Plain(changed)
        if others and changed != reader and not any(np.isnan(plain.number(text)) for text in others):
            fields = {"decimal": decimal, "thousands": thousands, "affixes": list(affixes)}
            own = {"decimal": reader.decimal, "thousands": reader.thousands, "affixes": list(reader.affixes)}
            ways.append(
                "set " + " and ".join(f"data.{name}: {value!r}" for name, value in fields.items() if value != own[name])
            )
            break
    if not ways:
        ways.append(f"add texts that mean no value, as {named(others[:1])} may, to data.missing_values")
    if where is None:
        return ", or ".join(ways)
    ways.append(f"set {where}.cast to number (such texts become missing values) or to category")
    return ", ".join(ways[:-1]) + f", or {ways[-1]}"


def are_near(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """[N]: whether a text is a number with other separators, a currency or a percent sign, such as `1.634,5` and `$2`."""
    found = pc.match_substring_regex(pc.utf8_trim_whitespace(column), _NEAR)
    return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


class _Plain:
    """Converts one text at a time.

    Args:
        reader: decimal and thousands separators, and affixes.
    """

    def __init__(self, reader: ReaderOptions) -> None:
        self._reader = reader
        thousands = re.escape(reader.thousands) if reader.thousands else None
        whole = rf"\d{{1,3}}(?:{thousands}\d{{3}})+|\d*" if thousands else r"\d*"
        self._form = re.compile(rf"[+-]?(?:{whole})(?:{re.escape(reader.decimal)}\d*)?(?:[eE][+-]?\d+)?", re.ASCII)

    def number(self, text: str) -> float:
        """The number, or NaN for a text that is not a finite number; `true` and `false` are 1 and 0."""
        if (truth := TRUTH.get(text.lower())) is not None:
            return truth
        for affix in self._reader.affixes:
            sign = text[:1] if text[:1] in ("+", "-") else ""
            text = sign + text[len(sign) :].removeprefix(affix).removesuffix(affix).strip()
        if not self._form.fullmatch(text):
            return np.nan
        if self._reader.thousands:
            text = text.replace(self._reader.thousands, "")
        try:
            value = float(text.replace(self._reader.decimal, "."))
        except ValueError:
            return np.nan
        return value if np.isfinite(value) else np.nan
