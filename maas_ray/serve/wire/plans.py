"""Plans: cached parses of requests that differ only in their numbers and ids; only these are parsed again.

A client repeats the same names, shapes and outputs, request after request. The text before the data of a JSON request,
or the whole JSON before binary tensors, is looked up verbatim. A cached plan was parsed from exactly that text by
`RequestReader`, so that no check is skipped; a miss returns None, and `RequestReader` parses the request as usual.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import orjson

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import TensorSpec
from maas_ray.serve.wire.binary import read_binary
from maas_ray.serve.wire.checks import InferRequest
from maas_ray.serve.wire.json_numbers import FixedNumbers, Numbers

MAX_PLANS = 64
MAX_HEAD_BYTES = 1024
"""This and `MAX_PLANS` limit the memory that the clients of one model can occupy in a replica."""

_MAX_SEEN = 1024
_DATA, _ID = f"data-{uuid4().hex}", uuid4().hex
"""Replace the data and the id, to find their positions; no request can contain them by chance."""
_LEADING_ID = re.compile(rb'\{"id": ?"([0-9A-Za-z_-]{1,256})"')
"""Clients that send ids put them first; one that would need escapes is left to the parser."""
_ID_FIRST = b'{"id"'
_BRACKET = re.compile(rb"[\[\]]")
_CHECKED = frozenset({"BYTES", "BOOL"})


class _Text(NamedTuple):
    """A JSON request with one input, without its data."""

    head: bytes
    tail: bytes
    numbers: FixedNumbers
    request: InferRequest


class _BinaryTensor(NamedTuple):
    """A binary tensor of a request."""

    spec: TensorSpec
    shape: tuple[int, ...]
    num_bytes: int


class _Parts(NamedTuple):
    """A request with only binary tensors."""

    parts: tuple[_BinaryTensor, ...]
    num_bytes: int
    request: InferRequest


class Plans:
    """Plans of one model version.

    Args:
        inputs: inputs of the signature, by name.
        numbers: readers of the inputs that can be JSON numbers.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], numbers: Mapping[str, Numbers]) -> None:
        self._inputs = inputs
        self._name = next(iter(inputs), "")
        self._numbers = numbers.get(self._name) if len(inputs) == 1 else None
        self._texts: dict[bytes, _Text] = {}
        self._last: _Text | None = None
        """Plan of the last request without an id; the next request often has the same."""
        self._parts: dict[bytes, _Parts] = {}
        self._seen: set[int] = set()

    def __len__(self) -> int:
        """Number of cached parses."""
        return len(self._texts) + len(self._parts)

    def read_json(self, body: bytes) -> InferRequest | None:
        """Returns a request whose text before and after the data is cached."""
        if self._numbers is None:
            return None
        plan, request_id = self._last, None
        if plan is not None and body.startswith(plan.head) and body.endswith(plan.tail):
            start = len(plan.head)
        else:
            start = body.find(b"[", body.find(b'"data"'))
            head = body[:start]
            if head.startswith(_ID_FIRST):
                head, request_id = _split_id(head)
            plan = self._texts.get(head)
            if plan is None or not body.endswith(plan.tail):
                return None
            if request_id is None:
                self._last = plan
        array = plan.numbers.read(body[start : len(body) - len(plan.tail)])
        if array is None:
            return None
        known = plan.request
        return InferRequest(
            known.id if request_id is None else request_id, {self._name: array}, known.outputs, known.num_rows,
            known.timeout_us, known.priority,
        )  # fmt: skip

    def read_parts(self, body: bytes | memoryview, header_length: int) -> InferRequest | None:
        """Returns a request whose JSON is cached."""
        text, request_id = _split_id(bytes(body[:header_length]))
        plan = self._parts.get(text)
        if plan is None or len(body) - header_length != plan.num_bytes:
            return None
        found: dict[str, Array] = {}
        offset = header_length
        for spec, shape, num_bytes in plan.parts:
            if spec.datatype in _CHECKED or not num_bytes:
                array = read_binary(spec, shape, memoryview(body)[offset : offset + num_bytes])
            else:
                array = np.ndarray(shape, NUMPY[spec.datatype], body, offset)
                if not array.flags.aligned:
                    array = array.copy()
            found[spec.name] = array
            offset += num_bytes
        return _renew(plan.request, request_id, {name: found[name] for name in self._inputs if name in found})

    def learn_json(self, body: bytes, request: InferRequest) -> None:
        """Caches a request that has been parsed, when its text occurs the second time."""
        if self._numbers is None or not (0 < (start := body.find(b"[", body.find(b'"data"'))) <= MAX_HEAD_BYTES):
            return
        head, request_id = _split_id(body[:start])
        if not self._is_repeated(head):
            return
        tail = body[_end(body, start) :]
        document = _try(b'%b"%b"%b' % (_join_id(head, request_id), _DATA.encode(), tail), request_id)
        # Any JSON value in place of this string is the data of the only input, and everything else stays the same.
        if document is not None and document["inputs"][0].get("data") == _DATA and len(tail) <= MAX_HEAD_BYTES:
            _keep(self._texts, head, _Text(head, tail, self._numbers.fixed(request.inputs[self._name].shape), request))

    def learn_parts(self, body: bytes | memoryview, header_length: int, request: InferRequest) -> None:
        """Caches a request that has been parsed, when its JSON occurs the second time."""
        if header_length > MAX_HEAD_BYTES:
            return
        text, request_id = _split_id(bytes(body[:header_length]))
        if not self._is_repeated(text):
            return
        document = _try(_join_id(text, request_id), request_id)
        if document is None:
            return
        parts = []
        for entry in document["inputs"]:
            size = (entry.get("parameters") or {}).get("binary_data_size")
            if size is None:
                return
            spec = self._inputs[entry["name"]]
            parts.append(_BinaryTensor(spec, request.inputs[spec.name].shape, size))
        _keep(self._parts, text, _Parts(tuple(parts), sum(part.num_bytes for part in parts), request))

    def _is_repeated(self, head: bytes) -> bool:
        """Whether this text has occurred before: unique ones, such as with an id in another place, are not cached."""
        key = hash(head)
        if key in self._seen:
            return True
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return False


def _renew(known: InferRequest, request_id: str | None, inputs: dict[str, Array]) -> InferRequest:
    return InferRequest(
        known.id if request_id is None else request_id,
        inputs,
        known.outputs,
        known.num_rows,
        known.timeout_us,
        known.priority,
    )


def _split_id(text: bytes) -> tuple[bytes, str | None]:
    """Returns the text without the id at its start, and the id; the text then begins with a comma, not a brace."""
    if not text.startswith(_ID_FIRST):
        return text, None
    match = _LEADING_ID.match(text)
    return (text, None) if match is None else (text[match.end() :], match[1].decode())


def _join_id(rest: bytes, request_id: str | None) -> bytes:
    return rest if request_id is None else b'{"id":"%b"%b' % (_ID.encode(), rest)


def _end(body: bytes, start: int) -> int:
    """Returns the position after the bracket that closes the one at `start`; only numbers are between, no strings."""
    depth = 0
    for match in _BRACKET.finditer(body, start):
        depth += 1 if match[0] == b"[" else -1
        if not depth:
            return match.end()
    return len(body)


def _try(text: bytes, request_id: str | None) -> dict[str, Any] | None:
    """Returns the document, if it has inputs, and its id is the one at its start."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    inputs = document.get("inputs") if type(document) is dict else None
    if type(inputs) is not list or not inputs or not all(type(entry) is dict for entry in inputs):
        return None
    return document if request_id is None or document.get("id") == _ID else None


def _keep(plans: dict[bytes, Any], head: bytes, plan: Any) -> None:
    if len(plans) >= MAX_PLANS:
        plans.clear()
    # Only the rest of the request is needed; its tensors are not kept.
    plans[head] = plan._replace(request=_renew(plan.request, None, {}))
