"""One request of the generate extension over HTTP: a flat JSON object, answered with one or with a server-sent event.

A model here sends one response per request, so a stream has one event. Independent of sockets.
"""

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.http.call import HttpCall
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.offload import check
from maas_ray.serve.wire.answer import InferResponse
from maas_ray.serve.wire.answer_size import INLINE_S
from maas_ray.serve.wire.checks import InferRequest
from maas_ray.serve.wire.generate import as_event, read_generate, write_generate

EVENTS: Header = (b"content-type", b"text/event-stream")


class GenerateCall(HttpCall):
    """As `HttpCall`, in the format of the extension."""

    __slots__ = ()

    def read(self, loaded: Loaded) -> InferRequest:
        return read_generate(self._message or b"", loaded.info.signature)

    def is_read_apart(self, loaded: Loaded) -> bool:
        return True

    def read_large(self, loaded: Loaded, stop: StopSignal) -> InferRequest:
        return self.read(loaded)

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> InferResponse | None:
        if loaded.codec.writer.expected_s(request, outputs) > INLINE_S:
            return None
        return self._answer(write_generate(loaded.version.model, loaded.version.version, request, outputs))

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> InferResponse:
        version, writer = loaded.version, loaded.codec.writer
        writer.expected_s(request, outputs)
        return self._answer(write_generate(
            version.model, version.version, request, outputs,
            lambda name, array: writer.large_json_data(name, array, lambda: check(stop)),
        ))  # fmt: skip

    def _answer(self, document: bytes) -> InferResponse:
        return InferResponse(as_event(document) if self._is_stream else document, None)

    def headers_of(self, loaded: Loaded) -> tuple[Header, ...]:
        return (EVENTS, *loaded.headers) if self._is_stream else loaded.json_headers

    @property
    def _is_stream(self) -> bool:
        return self._head.route.name == "generate_stream"
