"""Messages of the protocol as bytes: parsed, and split where large tensors begin. Independent of models.

Large tensors are not copied: the raw contents of a request are used where they were received, and those of a response
are appended to the rest of its message. A message is the sequence of its fields, in any order, which makes both
possible (protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from maas_ray.bundle.datatypes import Array
from maas_ray.errors import BadRequest, BodyTooLarge
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.wire.binary import num_binary_bytes

MAX_TYPED_BYTES = 1 << 20
"""Maximum message size without raw contents: protobuf parses it in one step, 40 ns per element, up to half a
million."""
SPLIT_BYTES = 16 << 10
"""From this size on, finding the raw contents costs less than letting protobuf copy them (3 µs for any size,
measured)."""

ASKS_FOR_FINAL = "triton_enable_empty_final_response"
"""Parameter of a streamed request: marks its last response as the final one."""

_LENGTH_DELIMITED = 2
_RAW_INPUTS = 7 << 3 | _LENGTH_DELIMITED
_MAX_VARINT_BITS = 63
_MAX_FIELDS = 1024
"""Maximum number of fields that are scanned in a large message; each takes about half a microsecond."""
_RAW_OUTPUTS = bytes([6 << 3 | _LENGTH_DELIMITED])
_INFER_RESPONSE = bytes([2 << 3 | _LENGTH_DELIMITED])

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


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns parameters of any message by name, as in JSON; None if there are none."""
    if not parameters:
        return None
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in parameters.items()
    }


def raw_output(encoded: Part) -> tuple[Part, Part]:
    """Returns an element of `raw_output_contents`, in two parts."""
    return _RAW_OUTPUTS + _varint(num_binary_bytes(encoded)), encoded


def as_stream_response(parts: Sequence[Part]) -> list[Part]:
    """Returns the `ModelStreamInferResponse` around a `ModelInferResponse`, both in parts."""
    return [_INFER_RESPONSE + _varint(sum(num_binary_bytes(part) for part in parts)), *parts]


def join(parts: Sequence[Any]) -> bytes:
    """Joins the parts of a message."""
    return b"".join(parts)


def num_bytes(parts: Sequence[Part]) -> int:
    """Returns the bytes of a message in parts."""
    return sum(num_binary_bytes(part) for part in parts)


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
