"""Formats of inference over HTTP: the v2 protocol, and the generate extension. Independent of sockets."""

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.request.call import INLINE_READ_BYTES
from maas_ray.serve.request.head import Head, Header
from maas_ray.serve.request.offload import check
from maas_ray.serve.request.request import WireFormat
from maas_ray.serve.request.response import BINARY, Reply
from maas_ray.serve.wire.answer import InferResponse
from maas_ray.serve.wire.answer_size import INLINE_S
from maas_ray.serve.wire.checks import InferRequest
from maas_ray.serve.wire.generate import as_event, read_generate, write_generate

Body = bytes | memoryview
HttpFormat = WireFormat[Body, Reply]

EVENTS: Header = (b"content-type", b"text/event-stream")
_PRIORITY = b'"priority"'


class InferFormat:
    """Requests and responses of `infer`.

    Args:
        header_length: bytes of the JSON before binary tensors; None: the body is JSON only.
    """

    __slots__ = ("_header_length",)

    def __init__(self, header_length: int | None) -> None:
        self._header_length = header_length

    def may_have_priority(self, message: Body) -> bool:
        return _PRIORITY in bytes(message if self._header_length is None else message[: self._header_length])

    def is_slow_to_read(self, loaded: Loaded, message: Body) -> bool:
        length = self._header_length
        return loaded.codec.has_strings or length is None or length > INLINE_READ_BYTES

    def read(self, loaded: Loaded, message: Body) -> InferRequest:
        return loaded.codec.read(message, self._header_length)

    def read_large(self, loaded: Loaded, message: Body, stop: StopSignal) -> InferRequest:
        return loaded.codec.read_large(message, self._header_length, lambda: check(stop))

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> Reply | None:
        response = loaded.codec.write(request, outputs)
        if response is None or response[1] is not None:
            return None if response is None else _reply(loaded, response)
        # Same as Reply(...), which is a Python function.
        return tuple.__new__(Reply, (200, loaded.json_headers, response[0]))

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> Reply:
        return _reply(loaded, loaded.codec.write_large(request, outputs, lambda: check(stop)))

    def num_bytes(self, answer: Reply) -> int:
        return len(answer.body)


class GenerateFormat:
    """Requests and responses of `generate` and `generate_stream`: a flat JSON object, or one server-sent event.

    A model here sends one response per request, so a stream has one event.

    Args:
        is_stream: whether the response is an event.
    """

    __slots__ = ("_is_stream",)

    def __init__(self, is_stream: bool) -> None:
        self._is_stream = is_stream

    def may_have_priority(self, message: Body) -> bool:
        return _PRIORITY in bytes(message)

    def is_slow_to_read(self, loaded: Loaded, message: Body) -> bool:
        return True

    def read(self, loaded: Loaded, message: Body) -> InferRequest:
        return read_generate(message, loaded.info.signature)

    def read_large(self, loaded: Loaded, message: Body, stop: StopSignal) -> InferRequest:
        return self.read(loaded, message)

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> Reply | None:
        if loaded.codec.writer.expected_s(request, outputs) > INLINE_S:
            return None
        return self._reply(loaded, write_generate(loaded.version.model, loaded.version.version, request, outputs))

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> Reply:
        version, writer = loaded.version, loaded.codec.writer
        writer.expected_s(request, outputs)
        return self._reply(loaded, write_generate(
            version.model, version.version, request, outputs,
            lambda name, array: writer.large_json_data(name, array, lambda: check(stop)),
        ))  # fmt: skip

    def num_bytes(self, answer: Reply) -> int:
        return len(answer.body)

    def _reply(self, loaded: Loaded, document: bytes) -> Reply:
        if self._is_stream:
            return Reply(200, (EVENTS, *loaded.headers), as_event(document))
        return Reply(200, loaded.json_headers, document)


def format_of(head: Head) -> HttpFormat:
    """Returns the format of an inference request."""
    name = head.route.name
    return InferFormat(head.header_length) if name == "infer" else GenerateFormat(name == "generate_stream")


def _reply(loaded: Loaded, response: InferResponse) -> Reply:
    body, header_length = response
    if header_length is None:
        headers = loaded.json_headers
    else:
        headers = (BINARY, *loaded.headers, (b"inference-header-content-length", b"%d" % header_length))
    return Reply(200, headers, body)
