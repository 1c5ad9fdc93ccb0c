"""Codec of v2 protocol messages: conversion to and from tensors, validated against the signature.

Large tensors are not copied: the raw contents of a request are used where they were received, and those of a response
are appended to the rest of its message. A message is the sequence of its fields, in any order, which makes both
possible (protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from math import prod
from typing import Any, cast

import numpy as np
from google.protobuf.message import DecodeError

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import BundleInfo, Datatype, TensorSpec
from maas_ray.bundle.strings import decode, encode
from maas_ray.errors import BadRequest, BodyTooLarge
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.wire.answer_size import INLINE_S, MAX_ANSWER_BYTES, PIECE, AnswerSize, Pause, pieces
from maas_ray.serve.wire.binary import num_binary_bytes, read_binary, write_binary, write_strings
from maas_ray.serve.wire.checks import (
    InferRequest,
    WantedOutput,
    check_datatype,
    check_id,
    complete_inputs,
    known_input,
    num_rows,
    wanted_outputs,
)  # fmt: skip
from maas_ray.serve.wire.classification import classify
from maas_ray.serve.wire.parameters import input_size, request_parameters
from maas_ray.serve.wire.tensors import BINARY_ONLY, check_shape, short

MAX_TYPED_BYTES = 1 << 20
"""Maximum message size without raw contents: protobuf parses it in one step, 40 ns per element, up to half a
million."""
SPLIT_BYTES = 16 << 10
"""From this size on, finding the raw contents costs less than letting protobuf copy them (3 µs for any size,
measured)."""

ASKS_FOR_FINAL = "triton_enable_empty_final_response"
"""Parameter of a streamed request: marks its last response as the final one."""

_CONTENTS: dict[Datatype, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Field of `InferTensorContents` by datatype; FP16 and BF16 have none and are sent raw."""

_LENGTH_DELIMITED = 2
_RAW_INPUTS = 7 << 3 | _LENGTH_DELIMITED
_RAW_OUTPUTS = bytes([6 << 3 | _LENGTH_DELIMITED])
_INFER_RESPONSE = bytes([2 << 3 | _LENGTH_DELIMITED])
_MAX_VARINT_BITS = 63
_MAX_FIELDS = 1024
"""Maximum number of fields that are scanned in a large message; each takes about half a microsecond."""

Part = bytes | Array
"""A piece of a message, as bytes or as an array whose buffer contains them."""


def parse(kind: Any, body: bytes) -> Any:
    """Parses a message.

    Raises:
        BadRequest: not a serialized message of this kind.
    """
    try:
        return kind.FromString(body)
    except DecodeError:
        raise BadRequest(f"the {len(body)} bytes received are not a {kind.DESCRIPTOR.name}") from None


def is_quickly_parsed(body: bytes) -> bool:
    """Whether a message is small, or consists mostly of raw contents, which are not parsed."""
    if len(body) <= SPLIT_BYTES:
        return True
    parts = _split(body)
    return parts is not None and len(parts[0]) <= SPLIT_BYTES


class ModelInfer:
    """A `ModelInferRequest` as received; its tensors are read once its model is known.

    Args:
        body: serialized message.

    Raises:
        BadRequest: not a serialized message.
    """

    __slots__ = ("asks_for_final", "id", "message", "num_bytes", "parameters", "raw")

    def __init__(self, body: bytes) -> None:
        self.num_bytes = len(body)
        parts = _split(body) if len(body) >= SPLIT_BYTES else None
        rest = body if parts is None else parts[0]
        if len(rest) > MAX_TYPED_BYTES:
            raise BodyTooLarge(
                f"the message has {len(rest)} bytes besides its raw_input_contents, the limit is {MAX_TYPED_BYTES}; send "
                "the tensors as raw_input_contents"
            )
        self.message = parse(pb.ModelInferRequest, rest)
        self.raw: Sequence[bytes | memoryview] = self.message.raw_input_contents if parts is None else parts[1]
        self.id: str = self.message.id
        self.parameters = plain_parameters(self.message.parameters)
        self.asks_for_final = self.parameters is not None and self.parameters.pop(ASKS_FOR_FINAL, False) is True


class MessageCodec:
    """Parses the requests of one model version from messages and writes its responses to messages.

    Args:
        model: name of the model.
        version: number of the version.
        info: description of the version.
        max_answer_bytes: maximum bytes of a response's tensors.
    """

    def __init__(self, model: str, version: int, info: BundleInfo, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._model = model
        self._version = str(version)
        self._labels = info.labels
        self._signature = info.signature
        self._size = AnswerSize(max_answer_bytes, is_batched=info.signature.is_batched)
        self._inputs = {tensor.name: tensor for tensor in info.signature.inputs}
        self._outputs = {tensor.name: tensor for tensor in info.signature.outputs}
        self._all_raw = wanted_outputs((), self._outputs, is_binary=True)

    def read_message(self, received: ModelInfer) -> InferRequest:
        """Returns the validated request.

        Raises:
            BadRequest: malformed, or it does not match the signature.
        """
        message, raw = received.message, received.raw
        parameters = request_parameters(received.parameters)
        if raw and len(raw) != len(message.inputs):
            raise BadRequest(
                f"the request has {len(message.inputs)} inputs and {len(raw)} raw_input_contents; send one for each "
                "input, in the same order, or none and typed contents"
            )
        found: dict[str, Array] = {}
        for index, entry in enumerate(message.inputs):
            spec = known_input(entry.name, self._inputs, found)
            check_datatype(spec, entry.datatype)
            shape = check_shape(spec, list(entry.shape))
            input_size(plain_parameters(entry.parameters), spec.name)
            if not raw:
                found[spec.name] = _read_typed(spec, shape, entry.contents)
            elif entry.HasField("contents") and entry.contents.ListFields():
                raise BadRequest(f"input {spec.name!r} has both contents and raw_input_contents; send one of them")
            else:
                found[spec.name] = read_binary(spec, shape, memoryview(raw[index]))
        inputs = complete_inputs(found, self._inputs)
        return InferRequest(
            id=check_id(received.id or None),
            inputs=inputs,
            outputs=self._wanted(message.outputs, is_raw=not _asks_for_typed(received.parameters)),
            num_rows=num_rows(inputs, self._signature),
            timeout_us=parameters.timeout_us,
            priority=parameters.priority,
        )

    def write_message(self, request: InferRequest, outputs: Mapping[str, Array]) -> list[Part] | None:
        """Returns the `ModelInferResponse` of a request, in consecutive parts.

        Args:
            request: the request.
            outputs: at least the requested ones.

        Returns:
            None if writing it takes so long that `write_large` must, in a thread.

        Raises:
            AnswerTooLarge: it exceeds the limit.
        """
        return None if self._size.expected_s(request, outputs) > INLINE_S else self._write(request, outputs, _never)

    def write_large(self, request: InferRequest, outputs: Mapping[str, Array], pause: Pause) -> list[Part]:
        """As `write_message`, for a thread; `pause` is called between two pieces of work. Returns one part."""
        self._size.expected_s(request, outputs)
        return [join(self._write(request, outputs, pause))]

    def _write(self, request: InferRequest, outputs: Mapping[str, Array], pause: Pause) -> list[Part]:
        message = pb.ModelInferResponse(model_name=self._model, model_version=self._version, id=request.id or "")
        raw: list[Part] = []
        for wanted in request.outputs:
            array, datatype = outputs[wanted.name], self._outputs[wanted.name].datatype
            if wanted.classes:
                array = classify(
                    array, wanted.classes, self._labels, is_batched=self._signature.is_batched, pause=pause
                )
                datatype = "BYTES"
            tensor = message.outputs.add(name=wanted.name, datatype=datatype, shape=array.shape)
            if not wanted.is_binary:
                _write_typed(tensor.contents, datatype, array, pause)
                continue
            if array.dtype == object:
                strings = (write_strings(piece) for piece in pieces(array))
                encoded: Part = b"".join(self._size.bounded(strings, pause))
            else:
                encoded = write_binary(array)
            raw += (_RAW_OUTPUTS + _varint(num_binary_bytes(encoded)), encoded)
        return [message.SerializeToString(), *raw]

    def _wanted(self, entries: Sequence[Any], *, is_raw: bool) -> tuple[WantedOutput, ...]:
        """Outputs are raw, as Triton's clients read them, unless typed contents are requested like JSON over HTTP.

        Either all outputs of a response are raw, or none is; datatypes without typed contents are raw.
        """
        if is_raw and not entries:
            return self._all_raw
        pairs = [(entry.name, plain_parameters(entry.parameters)) for entry in entries]
        # First as if nothing were typed: a datatype without typed contents is no reason for a refusal.
        wanted = wanted_outputs(pairs, self._outputs, is_binary=True)
        if not is_raw:
            said = {name: (parameters or {}).get("binary_data") for name, parameters in pairs}
            wanted = tuple(output._replace(is_binary=bool(said.get(output.name))) for output in wanted)
        is_raw = any(
            output.is_binary or (self._outputs[output.name].datatype in BINARY_ONLY and not output.classes)
            for output in wanted
        )
        return tuple(output._replace(is_binary=is_raw) for output in wanted)


def as_stream_response(parts: Sequence[Part]) -> list[Part]:
    """Returns the `ModelStreamInferResponse` around a `ModelInferResponse`, both in parts."""
    return [_INFER_RESPONSE + _varint(sum(num_binary_bytes(part) for part in parts)), *parts]


def join(parts: Sequence[Any]) -> bytes:
    """Joins the parts of a message."""
    return b"".join(parts)


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns parameters of any message by name, as in JSON; None if there are none."""
    if not parameters:
        return None
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in parameters.items()
    }


def _asks_for_typed(parameters: Mapping[str, Any] | None) -> bool:
    """Whether the response must have typed contents: the parameter that requests JSON over HTTP."""
    given = None if parameters is None else parameters.get("binary_data_output")
    return given is not None and not given


def _read_typed(spec: TensorSpec, shape: tuple[int, ...], contents: Any) -> Array:
    field = _CONTENTS.get(spec.datatype)
    if field is None:
        raise BadRequest(f"input {spec.name!r}: {spec.datatype} has no typed contents; send raw_input_contents")
    if others := [other.name for other, _ in contents.ListFields() if other.name != field]:
        raise BadRequest(f"input {spec.name!r} is {spec.datatype}: send {field} instead of {', '.join(others)}")
    values = getattr(contents, field)
    if len(values) != prod(shape):
        raise BadRequest(
            f"input {spec.name!r}: {field} has {len(values)} elements, shape {list(shape)} needs {short(prod(shape))}"
        )
    if spec.datatype == "BYTES":
        return _strings(values).reshape(shape)
    dtype = NUMPY[spec.datatype]
    if field not in ("int_contents", "uint_contents"):
        return cast(Array, _from_iterable(values, dtype).reshape(shape))
    numbers = _from_iterable(values, np.dtype(np.int64))
    bounds = np.iinfo(dtype)  # type: ignore[type-var]
    fits = (numbers >= bounds.min) & (numbers <= bounds.max)
    if not fits.all():
        index = int(np.argmin(fits))
        raise BadRequest(f"input {spec.name!r}: element {index} is {numbers[index]}, out of range for {spec.datatype}")
    return cast(Array, numbers.astype(dtype).reshape(shape))


def _from_iterable(values: Sequence[Any], dtype: Any) -> Any:
    """Converts in pieces, so that a thread does not hold the interpreter for long."""
    count, rest = len(values), iter(values)
    sizes = [min(PIECE, count - start) for start in range(0, count, PIECE)]
    parts = [np.fromiter(islice(rest, size), dtype, size) for size in sizes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype)


def _strings(values: Sequence[bytes]) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = [decode(value) for value in values]
    return array


def _write_typed(contents: Any, datatype: Datatype, array: Array, pause: Pause) -> None:
    field = getattr(contents, _CONTENTS[datatype])
    for piece in pieces(array):
        values = piece.tolist()
        field.extend([encode(value) for value in values] if datatype == "BYTES" else values)
        pause()


def _never() -> None:
    """Pause of work that is never cancelled."""


def _split(body: bytes) -> tuple[bytes, list[memoryview]] | None:
    """Splits a `ModelInferRequest` into the rest and its raw contents; None if only protobuf can parse it."""
    view = memoryview(body)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    position = 0
    try:
        while position < len(body):
            start, tag = position, body[position]
            if tag & 0x80 or tag & 7 != _LENGTH_DELIMITED:  # no field of the message has this form
                return None
            size = shift = 0
            while True:
                position += 1
                byte = body[position]
                size |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > _MAX_VARINT_BITS:
                    return None
            position += 1
            end = position + size
            if end > len(body):
                return None
            if tag == _RAW_INPUTS:
                raw.append(view[position:end])
            else:
                rest.append(view[start:end])
            if len(raw) + len(rest) > _MAX_FIELDS:
                return None
            position = end
    except IndexError:  # it ends within a length
        return None
    return b"".join(rest), raw


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
