"""Responses of the Open Inference Protocol v2: converts tensors to bytes. Constant parts are built once per version.

NaN and infinity have no literal in JSON (RFC 8259) and become null there; binary data contains them unchanged.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import BundleInfo, TensorSpec
from maas_ray.errors import BadRequest
from maas_ray.serve.wire.answer_size import INLINE_S, MAX_ANSWER_BYTES, AnswerSize, Pause, pieces
from maas_ray.serve.wire.binary import num_binary_bytes, write_binary, write_strings
from maas_ray.serve.wire.checks import InferRequest, WantedOutput
from maas_ray.serve.wire.classification import classify
from maas_ray.serve.wire.tensors import write_json

_MAX_SHAPES = 256
"""Number of shapes of an output whose JSON is cached; a model with a free length would otherwise collect all of
them."""


class InferResponse(NamedTuple):
    """Body of a response."""

    body: bytes
    header_length: int | None
    """Bytes of JSON before the binary tensors, to be sent as `inference-header-content-length` with the content type
    application/octet-stream; None if the body is JSON only."""


class AnswerWriter:
    """Writes the responses of one model version."""

    def __init__(self, model: str, version: int, info: BundleInfo, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        names = orjson.dumps({"model_name": model, "model_version": str(version)})
        self._start = names[:-1]
        self._is_batched = info.signature.is_batched
        self._size = AnswerSize(max_bytes, is_batched=info.signature.is_batched)
        self._labels = info.labels
        self._outputs = {tensor.name: _OutputWriter(tensor) for tensor in info.signature.outputs}
        self._wholes: dict[tuple[WantedOutput, tuple[int, ...]], bytes] = {}
        """Everything before the data of a response with one JSON tensor and no id, the most frequent case."""

    def write(self, request: InferRequest, outputs: Mapping[str, Array]) -> InferResponse | None:
        """Returns the response of a request; None if writing it takes so long that `write_large` must, in a thread.

        Args:
            request: the request.
            outputs: at least the wanted ones; float, integer and bool arrays, BF16 as uint16 bits, BYTES as `str`.

        Raises:
            AnswerTooLarge: it exceeds the limit.
        """
        if request.id is None and len(request.outputs) == 1:
            (wanted,) = request.outputs
            array = outputs[wanted.name]
            whole = self._wholes.get((wanted, array.shape))
            if whole is not None:
                data = orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)
                # Same as InferResponse(...), which is a Python function.
                return tuple.__new__(InferResponse, (b"%b%b}]}" % (whole, data), None))
        if self._size.expected_s(request, outputs) > INLINE_S:
            return None
        parts, tail = self._write(request, outputs, None)
        header = b"".join(parts)
        if not tail:
            self._keep_whole(request, outputs)
            return InferResponse(header, None)
        return InferResponse(b"".join([header, *tail]), len(header))

    def write_large(self, request: InferRequest, outputs: Mapping[str, Array], pause: Pause) -> InferResponse:
        """As `write`, in pieces, for a thread: no piece holds the interpreter for long.

        Args:
            request: the request.
            outputs: as for `write`.
            pause: called between two pieces.

        Raises:
            AnswerTooLarge: it exceeds the limit.
        """
        self._size.expected_s(request, outputs)
        parts, tail = self._write(request, outputs, pause)
        header = b"".join(parts)
        return InferResponse(b"".join([header, *tail]), len(header)) if tail else InferResponse(header, None)

    def _write(
        self, request: InferRequest, outputs: Mapping[str, Array], pause: Pause | None
    ) -> tuple[list[bytes], list[Any]]:
        start = self._start if request.id is None else b'%b,"id":%b' % (self._start, orjson.dumps(request.id))
        parts = [start, b',"outputs":[']
        tail: list[Any] = []
        for wanted in request.outputs:
            if len(parts) > 2:
                parts.append(b",")
            self._add(wanted, outputs[wanted.name], parts, tail, pause)
        parts.append(b"]}")
        return parts, tail

    def _keep_whole(self, request: InferRequest, outputs: Mapping[str, Array]) -> None:
        if request.id is not None or len(request.outputs) != 1:
            return
        (wanted,) = request.outputs
        array = outputs[wanted.name]
        if wanted.classes or array.dtype == object:
            return
        if len(self._wholes) >= _MAX_SHAPES:
            self._wholes.clear()
        writer = self._outputs[wanted.name]
        start = writer.start(array.shape, writer.datatype)
        self._wholes[wanted, array.shape] = b'%b,"outputs":[%b"data":' % (self._start, start)

    def _add(
        self, wanted: WantedOutput, array: Array, parts: list[bytes], tail: list[Any], pause: Pause | None
    ) -> None:
        writer = self._outputs[wanted.name]
        datatype = writer.datatype
        if wanted.classes:
            array = classify(array, wanted.classes, self._labels, is_batched=self._is_batched, pause=pause)
            datatype = b"BYTES"
        parts.append(writer.start(array.shape, datatype))
        if wanted.is_binary:
            encoded = self._binary(array, pause)
            tail.append(encoded)
            parts.append(b'"parameters":{"binary_data_size":%d}}' % num_binary_bytes(encoded))
        elif pause is None:
            parts += (b'"data":', json_data(wanted.name, array), b"}")
        else:
            parts += (b'"data":', self.large_json_data(wanted.name, array, pause), b"}")

    def large_json_data(self, name: str, array: Array, pause: Pause) -> bytes:
        """As `json_data`, in pieces.

        Raises:
            AnswerTooLarge: it exceeds the limit.
            BadRequest: as `json_data`.
        """
        data = (json_data(name, piece)[1:-1] for piece in pieces(array))
        return b"[%b]" % b",".join(self._size.bounded(data, pause))

    def expected_s(self, request: InferRequest, outputs: Mapping[str, Array]) -> float:
        """As `AnswerSize.expected_s`, for responses in another format."""
        return self._size.expected_s(request, outputs)

    def _binary(self, array: Array, pause: Pause | None) -> bytes | Array:
        if pause is None or array.dtype != object:
            return write_binary(array)
        return b"".join(self._size.bounded((write_strings(piece) for piece in pieces(array)), pause))


def json_data(name: str, array: Array) -> bytes:
    """Returns the flat values of an output as a JSON list.

    Raises:
        BadRequest: a string is not UTF-8.
    """
    try:
        return orjson.dumps(write_json(array), option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        raise BadRequest(
            f"output {name!r} has strings that are not UTF-8, which JSON cannot contain; request binary_data for it"
        ) from None


class _OutputWriter:
    """Name, datatype and shape of one output as JSON, cached by shape."""

    __slots__ = ("_name", "_starts", "datatype")

    def __init__(self, tensor: TensorSpec) -> None:
        self._name = orjson.dumps(tensor.name)
        self.datatype = tensor.datatype.encode()
        self._starts: dict[tuple[bytes, tuple[int, ...]], bytes] = {}

    def start(self, shape: tuple[int, ...], datatype: bytes) -> bytes:
        key = (datatype, shape)
        start = self._starts.get(key)
        if start is None:
            if len(self._starts) >= _MAX_SHAPES:
                self._starts.clear()
            start = self._starts[key] = b'{"name":%b,"datatype":"%b","shape":%b,' % (
                self._name,
                datatype,
                orjson.dumps(shape),
            )
        return start
