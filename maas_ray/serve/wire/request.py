"""Requests of the Open Inference Protocol v2: converts bodies to tensors. Independent of HTTP.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md, and the extensions named in
`binary` and `parameters`. If a JSON object has a key twice, the last one counts.
"""

from typing import Any

import orjson

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BadRequest
from maas_ray.serve.wire import json_numbers
from maas_ray.serve.wire.binary import raw_shape, read_binary, read_elements, read_raw_string
from maas_ray.serve.wire.checks import (
    InferRequest,
    WantedOutput,
    check_id,
    complete_inputs,
    count_rows,
    known_input,
    wanted_outputs,
)
from maas_ray.serve.wire.json_numbers import Numbers
from maas_ray.serve.wire.large_json import Pause, Span, split
from maas_ray.serve.wire.other_forms import OtherForms, pending, read_image_file
from maas_ray.serve.wire.parameters import RequestParameters, input_size, request_parameters
from maas_ray.serve.wire.plans import Plans
from maas_ray.serve.wire.tensors import BINARY_ONLY, check_shape, read_json

MAX_DEPTH = 100
"""Maximum nesting of a request's JSON, the same as Triton's."""

_SMALL_BYTES = 2048
"""Up to this size orjson and one packing of its numbers are faster than simdjson's proxies (measured)."""
_KEYS = frozenset({"id", "inputs", "outputs", "parameters"})
_INPUT_KEYS = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT_KEYS = frozenset({"name", "parameters"})


class RequestReader:
    """Parses the requests of one model version.

    Args:
        signature: inputs and outputs of the version.
        is_fast: whether numbers are read in bulk and repeated requests by their plans. Without, every request is parsed
            element by element, which defines what the fast paths must return.
    """

    def __init__(self, signature: Signature, *, is_fast: bool = True) -> None:
        self._is_batched = signature.is_batched
        self._inputs = {tensor.name: tensor for tensor in signature.inputs}
        self._outputs = {tensor.name: tensor for tensor in signature.outputs}
        self._numbers = {
            tensor.name: Numbers(tensor.datatype)
            for tensor in signature.inputs
            if is_fast and Numbers.can_read(tensor.datatype)
        }
        self._forms = OtherForms(signature.inputs)
        self._required = {tensor.name: tensor for tensor in signature.required}
        self.plans = Plans(self._inputs, self._numbers)
        """Cached parses of repeated requests."""
        self._is_numeric = len(self._numbers) == len(self._inputs)
        self._all_binary = wanted_outputs((), self._outputs, is_binary=True)
        has_json_form = not any(tensor.datatype in BINARY_ONLY for tensor in signature.outputs)
        self._all_json = wanted_outputs((), self._outputs, is_binary=False) if has_json_form else None

    def read(self, body: bytes | memoryview, header_length: int | None = None) -> InferRequest:
        """Parses an inference request.

        Args:
            body: JSON in UTF-8, then the binary tensors.
            header_length: bytes of JSON; None if the body is JSON only, 0 for a raw request.

        Raises:
            BadRequest: malformed, or it does not match the signature.
        """
        if header_length is None:
            text = body if type(body) is bytes else bytes(body)
            request = self.plans.read_json(text)
            return self._read_text(text) if request is None else request
        if not 0 <= header_length <= len(body):
            raise BadRequest(
                f"inference-header-content-length is {header_length}, but the body has only {len(body)} bytes"
            )
        if header_length == 0:
            return self._read_raw(memoryview(body))
        request = self.plans.read_parts(body, header_length)
        if request is None:
            view = memoryview(body)
            request = self._read_document(bytes(view[:header_length]), view[header_length:])
            if request.is_plain:
                self.plans.learn_parts(body, header_length, request)
        return request

    def read_large(self, body: bytes | memoryview, header_length: int | None, pause: Pause) -> InferRequest:
        """As `read`, in pieces, for a thread: no piece holds the interpreter for long, and nothing is cached.

        Args:
            body: as for `read`.
            header_length: as for `read`.
            pause: called between two pieces; may raise.

        Raises:
            BadRequest: as `read`.
        """
        if header_length is not None and not 0 <= header_length <= len(body):
            return self.read(body, header_length)  # raises the error
        if header_length == 0:
            return self._read_raw(memoryview(body))
        if header_length is None:
            text, tail = body if type(body) is bytes else bytes(body), None
        else:
            view = memoryview(body)
            text, tail = bytes(view[:header_length]), view[header_length:]
        return self._read_loaded(split(text, len(self._inputs) + 1, pause), tail, may_hold_bool=True)

    def _read_text(self, text: bytes) -> InferRequest:
        request = self._read_large(text) if len(text) > _SMALL_BYTES and self._is_numeric else None
        if request is None:
            request = self._read_document(text, None)
        if request.is_plain:
            self.plans.learn_json(text, request)
        return request

    def _read_document(self, text: bytes, tail: memoryview | None) -> InferRequest:
        return self._read_loaded(_load(text), tail, may_hold_bool=_may_hold_bool(text))

    def _read_loaded(self, document: dict[str, Any], tail: memoryview | None, *, may_hold_bool: bool) -> InferRequest:
        if not _KEYS.issuperset(document):
            _check_depth(document)
        given = document.get("parameters")
        parameters = request_parameters(given)
        entries = _list_of_objects(document, "inputs")
        if entries is None:
            raise BadRequest("the request has no inputs; send {'inputs': [{name, shape, datatype, data}, ...]}")
        found: dict[str, Array] = {}
        offset, is_plain = 0, True
        for entry in entries:
            if not _INPUT_KEYS.issuperset(entry):
                _check_depth(entry)
            spec, shape = self._check_input(entry, found)
            given = entry.get("parameters")
            size = None if given is None else input_size(given, spec.name)
            own = self._inputs[spec.name]
            if size is None:
                array = self._read_json(spec, shape, entry.get("data"), may_hold_bool)
            else:
                read = read_binary if spec is own or spec.datatype != "BYTES" else read_elements
                array = read(spec, shape, _take(spec, entry, size, tail, offset))
                offset += size
            if spec is not own:
                array, is_plain = self._forms.convert(own, array), False
            found[spec.name] = array
        if tail is not None and offset != len(tail):
            raise BadRequest(
                f"{len(tail) - offset} bytes are left over after the binary data of the inputs; the sum of their "
                f"binary_data_size is {offset}"
            )
        request = self._finish(document, found, parameters)
        if not is_plain:
            request.is_plain, request.encoded = False, pending(request.inputs, self._inputs)
        return request

    def _read_json(self, spec: TensorSpec, shape: tuple[int, ...], data: Any, may_hold_bool: bool) -> Array:
        known = self._numbers.get(spec.name) if spec is self._inputs[spec.name] else None
        if type(data) is Span:
            return data.array(spec, shape, known)
        numbers = None if may_hold_bool else known
        array = None if numbers is None else numbers.from_list(data, shape)
        return read_json(spec, shape, data, may_hold_bool=may_hold_bool) if array is None else array

    def _read_large(self, text: bytes) -> InferRequest | None:
        """As `_read_text`, without a Python object per number; None for everything that is not clearly valid."""
        if text[:1] != b"{":  # simdjson would skip a byte order mark
            return None
        try:
            return self._read_proxies(text, json_numbers.parse(text))
        except BadRequest:
            return None  # the other path reports the error, in its own order

    def _read_proxies(self, text: bytes, document: Any) -> InferRequest | None:
        fields = json_numbers.fields(document, _KEYS)
        entries = None if fields is None else fields.pop("inputs", None)
        if fields is None or entries is None or not json_numbers.is_list(entries):
            return None
        found: dict[str, Array] = {}
        num_lists = 1 + ("outputs" in fields)
        for entry in entries:
            given = json_numbers.fields(entry, _INPUT_KEYS)
            data = None if given is None else given.pop("data", None)
            if given is None or not json_numbers.is_list(data):
                return None
            plain = {key: json_numbers.plain(value) for key, value in given.items()}
            spec, shape = self._check_input(plain, found)
            if input_size(plain.get("parameters"), spec.name) is not None or spec is not self._inputs[spec.name]:
                return None
            array = self._numbers[spec.name].from_proxy(data, shape)
            if array is None:
                return None
            found[spec.name] = array
            num_lists += 1 + json_numbers.num_lists(data, shape)
        if not json_numbers.has_lists(text, num_lists):  # a list in place of a number, or a bracket in a string
            return None
        rest = {key: json_numbers.plain(value) for key, value in fields.items()}
        return self._finish(rest, found, request_parameters(rest.get("parameters")))

    def _read_raw(self, view: memoryview) -> InferRequest:
        if len(self._required) != 1:
            raise BadRequest(
                f"a raw request (inference-header-content-length 0) needs a model with one input, this model has "
                f"{', '.join(map(repr, self._required))}; send a request with a JSON header"
            )
        (spec,) = self._required.values()
        file = read_image_file(spec, view) if spec.encoding is not None else None
        if file is not None:
            return InferRequest(None, {spec.name: file}, self._all_binary, 1, encoded=(spec.name,), is_plain=False)
        shape = raw_shape(spec, self._is_batched, len(view))
        read = read_raw_string if spec.datatype == "BYTES" else read_binary
        return InferRequest(None, {spec.name: read(spec, shape, view)}, self._all_binary, 1)

    def _check_input(self, entry: dict[str, Any], found: dict[str, Array]) -> tuple[TensorSpec, tuple[int, ...]]:
        spec = known_input(entry.get("name"), self._inputs, found)
        if entry.get("datatype") != spec.datatype:
            spec = self._forms.spec(spec, entry.get("datatype"), entry.get("shape"))
        shape = check_shape(spec, entry.get("shape"))
        if self._is_batched and not spec.optional and shape[0] == 0:
            raise BadRequest(f"input {spec.name!r}: shape {list(shape)} has no rows; send at least one")
        return spec, shape

    def _finish(self, document: dict[str, Any], found: dict[str, Array], parameters: RequestParameters) -> InferRequest:
        """Completes the request after its tensors were read."""
        inputs = complete_inputs(found, self._inputs)
        num_rows = 1
        if self._is_batched:
            is_plain = len(self._required) == len(self._inputs)
            num_rows = count_rows(inputs if is_plain else {name: inputs[name] for name in self._required})
        outputs = self._read_outputs(_list_of_objects(document, "outputs"), parameters.is_binary)
        request_id = check_id(document.get("id"))
        return InferRequest(request_id, inputs, outputs, num_rows, parameters.timeout_us, parameters.priority)

    def _read_outputs(self, entries: list[dict[str, Any]] | None, is_binary: bool) -> tuple[WantedOutput, ...]:
        if not entries:
            made = self._all_binary if is_binary else self._all_json
            return wanted_outputs((), self._outputs, is_binary=is_binary) if made is None else made
        for entry in entries:
            if not _OUTPUT_KEYS.issuperset(entry):
                _check_depth(entry)
        pairs = [(entry.get("name"), entry.get("parameters")) for entry in entries]
        return wanted_outputs(pairs, self._outputs, is_binary=is_binary)


def _load(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        rest = error.doc[error.pos :].lstrip("-")
        if rest.startswith(("NaN", "Infinity", "inf", "nan")):
            raise BadRequest(
                f"the body contains {rest[:8].split(',')[0].rstrip('] }')!r} at character {error.pos}, which is "
                "not valid JSON; send null for a missing value where the model's metadata says nullable"
            ) from None
        raise BadRequest(f"the body is not JSON in UTF-8: {error.msg} at character {error.pos}") from None
    if type(document) is not dict:
        raise BadRequest("the body is not a JSON object; send {'inputs': [{name, shape, datatype, data}, ...]}")
    return document


def _check_depth(document: dict[str, Any]) -> None:
    """Refuses deep nesting under unknown keys; known keys have their own limits."""
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise BadRequest(f"the body's JSON is nested more than {MAX_DEPTH} levels deep")


def _may_hold_bool(text: bytes) -> bool:
    return b"true" in text or b"false" in text


def _take(spec: TensorSpec, entry: dict[str, Any], size: int, tail: memoryview | None, offset: int) -> memoryview:
    """Returns the next `size` bytes of the binary data."""
    if tail is None:
        raise BadRequest(
            f"input {spec.name!r} has binary_data_size {size}, but the request has no inference-header-content-length"
        )
    if entry.get("data") is not None:
        raise BadRequest(f"input {spec.name!r} has both data and binary_data_size; send one of them")
    if size > len(tail) - offset:
        raise BadRequest(
            f"input {spec.name!r} has binary_data_size {size}, but only {len(tail) - offset} bytes of the body are left"
        )
    return tail[offset : offset + size]


def _list_of_objects(document: dict[str, Any], key: str) -> list[dict[str, Any]] | None:
    value = document.get(key)
    if value is None:
        return None
    if type(value) is not list or not all(type(entry) is dict for entry in value):
        raise BadRequest(f"{key} is not a list of objects")
    return value
