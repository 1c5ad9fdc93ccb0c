"""Large JSON bodies, parsed in pieces for a thread: no piece holds the interpreter for more than a few milliseconds.

    text → skeleton (everything except the `data` of inputs) + a `Span` for each data
    span → tokens (brackets, commas, and non-numbers) → kinds and counts are validated → values, in pieces

A parser would hold the interpreter until it has read the whole text: 2 s for 14 MB of lists of one number each.
Independent of requests: the caller, who knows the signature, reads the spans in place of the data.
"""

import re
from collections.abc import Callable
from math import prod
from typing import Any
from uuid import uuid4

import numpy as np
import orjson

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import TensorSpec
from maas_ray.errors import BadRequest
from maas_ray.serve.wire.json_numbers import Numbers
from maas_ray.serve.wire.tensors import BINARY_ONLY, MAX_STRINGS, read_json, short

MAX_SKELETON_BYTES = 64 << 10
"""Maximum JSON of a large request without the data of its inputs; it is parsed in one step."""

PIECE_BYTES = 64 << 10
_KEY = b'"data"'
_COLON = re.compile(rb"\s*:\s*(?=\[)")
_STRING = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")', re.DOTALL)
_NUMBER = b"0123456789+-.eE \t\r\n"
_SPACE = b" \t\r\n"
_STANDS = b"s"
"""Represents a string among the tokens."""
_MARK = uuid4().hex
_CLOSED: Any = np.zeros(256, np.int32)
_CLOSED[ord("[")], _CLOSED[ord("]")] = 1, -1

Pause = Callable[[], None]


class Span:
    """Data of one input, tokenized but not yet converted.

    Args:
        pause: called between two pieces; raises if the work was cancelled.
    """

    __slots__ = ("_num_strings", "_pause", "_pieces", "_tokens")

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._pieces: list[bytes] = []
        self._tokens: list[bytes] = []
        """Tokens of each piece."""
        self._num_strings = 0

    def take(self, text: bytes, start: int) -> int:
        """Reads the array that begins at `start`, and returns the position after it.

        Raises:
            BadRequest: it does not end, or has too many strings or an element that is too long.
        """
        depth, size = 0, PIECE_BYTES
        while True:
            self._pause()
            piece = text[start : start + size]
            parts = _around_strings(piece)
            between = parts[0::2]
            tokens = _STANDS.join(between)
            depths = depth + np.cumsum(_CLOSED[np.frombuffer(tokens, np.uint8)])
            closed = np.flatnonzero(depths == 0)
            is_last = len(closed) > 0
            cut = int(closed[0]) + 1 if is_last else tokens.rfind(b",") + 1
            if not is_last and start + size >= len(text):
                raise BadRequest("the body is not JSON: the data of an input does not end")
            if not cut:
                if len(tokens) > MAX_SKELETON_BYTES:
                    raise BadRequest(f"the data of an input has an element of more than {MAX_SKELETON_BYTES} bytes")
                size *= 2  # a string is longer than the piece
                continue
            end = start + _place_of(parts, cut)
            self._add(text[start:end], tokens[:cut])
            if is_last:
                return end
            depth, start, size = int(depths[cut - 1]), end, PIECE_BYTES

    def array(self, spec: TensorSpec, shape: tuple[int, ...], numbers: Numbers | None) -> Array:
        """Returns the tensor.

        Args:
            spec: spec of the input.
            shape: declared and validated shape.
            numbers: reader of its JSON numbers; None if it has none.

        Raises:
            BadRequest: as `read_json`.
        """
        if spec.datatype in BINARY_ONLY:
            read_json(spec, shape, [])  # raises the error
        is_text = spec.datatype == "BYTES"
        tokens = b"".join(self._tokens)
        self._check_structure(spec, shape, tokens, is_text)
        found: list[Array] = []
        count = 0
        for piece in self._pieces:
            self._pause()
            flat = _without_brackets(piece).strip(b", \t\r\n")
            part = _read_flat(spec, flat, count, None if is_text else numbers) if flat else None
            if part is not None:
                found.append(part)
                count += len(part)
        if count != prod(shape):
            raise BadRequest(f"input {spec.name!r}: data has {count} elements, shape {list(shape)} needs {prod(shape)}")
        return (np.concatenate(found) if found else read_json(spec, (0,), [])).reshape(shape)

    def check(self) -> None:
        """Raises `BadRequest` unless this is short JSON that is not the data of an input."""
        text = b"".join(self._pieces)
        if len(text) > MAX_SKELETON_BYTES:
            raise BadRequest(f"a list of {len(text)} bytes under the key 'data' belongs to no input; omit it")
        _load(text)

    def _add(self, piece: bytes, tokens: bytes) -> None:
        self._num_strings += tokens.count(_STANDS)
        if self._num_strings > MAX_STRINGS:
            raise BadRequest(f"the data of an input has more than {MAX_STRINGS} strings; send fewer rows per request")
        self._pieces.append(piece)
        self._tokens.append(tokens.translate(None, _NUMBER))

    def _check_structure(self, spec: TensorSpec, shape: tuple[int, ...], tokens: bytes, is_text: bool) -> None:
        """Validates kinds, then counts and nesting, before any value is converted."""
        allowed = b"[],s" if is_text else b"[],truefalsn" if spec.datatype == "BOOL" or spec.boolean else b"[],"
        if spec.nullable:
            allowed += b"nul"
        if rest := tokens.translate(None, allowed):
            place = tokens.find(rest[:1])
            index = tokens.count(b",", 0, place)
            kind = _KINDS.get(rest[:1], short(rest[:20].decode("latin-1")))
            expected = "a string" if is_text else "true or false" if spec.datatype == "BOOL" else "a number"
            raise BadRequest(f"input {spec.name!r} is {spec.datatype}: element {index} is {kind}, not {expected}")
        brackets = tokens.translate(None, b"struefalnl") if len(allowed) > len(b"[],") else tokens
        count = prod(shape)
        if not brackets.startswith(b"[[") or len(shape) < 2:
            if brackets.count(b"[") > 1:
                raise BadRequest(f"input {spec.name!r}: data is nested in one place, shape {list(shape)} is not")
            num_elements = brackets.count(b",") + 1  # or none, which is detected when they are read
            if num_elements != count and (count or num_elements > 1):
                raise BadRequest(
                    f"input {spec.name!r}: data has {num_elements} elements, shape {list(shape)} needs {short(count)}"
                )
        elif len(brackets) != _num_tokens(shape) or brackets != _nested(shape):
            raise BadRequest(
                f"input {spec.name!r}: the nesting of data does not match the declared shape {list(shape)}; send "
                "a flat list, or one nested exactly as the shape"
            )


_KINDS = {
    b"t": "true",
    b"f": "false",
    b"n": "null",
    _STANDS: "a string",
    b"{": "an object",
    b"N": "NaN, which JSON does not have",
}


def split(text: bytes, max_spans: int, pause: Pause) -> dict[str, Any]:
    """Returns the document, with a `Span` in place of the data of each input.

    Args:
        text: JSON.
        max_spans: maximum number of inputs.
        pause: called between two pieces; raises if the work was cancelled.

    Raises:
        BadRequest: not JSON, not an object, or too much JSON besides the data of its inputs.
    """
    if text[:PIECE_BYTES].lstrip(_SPACE)[:1] != b"{":
        raise BadRequest("the body is not JSON that begins with an object; send {'inputs': [{name, shape, …}, ...]}")
    spans: dict[str, Span] = {}
    parts: list[bytes] = []
    done = place = 0
    while len(spans) < max_spans and (place := text.find(_KEY, place)) >= 0:
        place += len(_KEY)
        colon = _COLON.match(text, place, place + PIECE_BYTES)
        if colon is None:
            continue
        span = Span(pause)
        mark = f"{_MARK}-{len(spans)}"
        spans[mark] = span
        parts += (text[done : colon.end()].strip(_SPACE), b'"%b"' % mark.encode())
        done = place = span.take(text, colon.end())
    parts.append(text[done:].strip(_SPACE))
    num_bytes = sum(map(len, parts))
    if num_bytes > MAX_SKELETON_BYTES:
        raise BadRequest(
            f"the body has {num_bytes} bytes of JSON besides the data of {len(spans)} inputs, the limit is "
            f"{MAX_SKELETON_BYTES}; send the data as flat lists under the key 'data', or as binary data"
        )
    document: dict[str, Any] = _load(b"".join(parts))
    entries = document.get("inputs")
    for entry in entries if type(entries) is list else ():
        given = entry.get("data") if type(entry) is dict else None
        if type(given) is str and given in spans:
            entry["data"] = spans.pop(given)
    for span in spans.values():  # under unknown keys
        span.check()
    return document


def _load(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error.msg}") from None


def _read_flat(spec: TensorSpec, flat: bytes, first: int, numbers: Numbers | None) -> Array:
    """Reads elements separated by commas."""
    text = b"[%b]" % flat
    array = numbers.from_flat_text(text) if numbers is not None else None
    if array is not None:
        return array
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not JSON: {error.msg}, in the data of input {spec.name!r} after element {first}"
        ) from None
    try:
        return read_json(spec, (len(data),), data)
    except BadRequest as refusal:
        raise BadRequest(f"{refusal}, counted from element {first}" if first else str(refusal)) from None


def _around_strings(piece: bytes) -> list[bytes]:
    """Splits text at strings: outside, inside, outside, …; escapes inside are masked. The last string may be open."""
    if b"\\" in piece:
        piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    return piece.split(b'"')


def _without_brackets(piece: bytes) -> bytes:
    if b'"' not in piece:
        return piece.translate(None, b"[]")
    if b"[" not in piece and b"]" not in piece:
        return piece
    parts = _STRING.split(piece)
    parts[0::2] = [part.translate(None, b"[]") for part in parts[0::2]]
    return b"".join(parts)


def _place_of(parts: list[bytes], num_tokens: int) -> int:
    """Returns the position in a piece at which this many of its tokens end; a string is one token."""
    place = 0
    for number, part in enumerate(parts):
        is_string = number % 2 == 1
        num = 1 if is_string else len(part)
        if num_tokens <= num and not is_string:
            return place + num_tokens
        num_tokens -= num
        place += len(part) + 2 * is_string
    return place


def _num_tokens(shape: tuple[int, ...]) -> int:
    count, total = 1, 0
    for size in shape:
        total += count * (2 + max(0, size - 1))
        count *= size
    return total


def _nested(shape: tuple[int, ...]) -> bytes:
    """Returns the brackets and commas of a tensor that is nested as its shape."""
    inner = b""
    for size in reversed(shape):
        inner = b"[%b]" % (b"%b," % inner * (size - 1) + inner if size else b"")
    return inner
