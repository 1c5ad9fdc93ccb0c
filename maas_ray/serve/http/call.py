"""One inference request of the v2 protocol over HTTP: request bytes to a response. Independent of sockets."""

from collections.abc import Callable

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import MaasError, Overloaded
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.request.call import INLINE_READ_BYTES, Call
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.offload import Workers, check
from maas_ray.serve.request.response import BINARY, Reply, error_reply
from maas_ray.serve.wire.answer import InferResponse
from maas_ray.serve.wire.checks import InferRequest
from maas_ray.serve.wire.compression import MIN_BYTES, deflate

Respond = Callable[[Reply], None]


class HttpCall(Call[bytes | memoryview, Respond, InferResponse]):
    """An uncompressed body as received, and the receiver of the response."""

    __slots__ = ()

    def has_priority(self) -> bool:
        length = self._head.header_length
        text = self._message or b""
        return b'"priority"' in bytes(text if length is None else text[:length])

    def read(self, loaded: Loaded) -> InferRequest:
        return loaded.codec.read(self._message or b"", self._head.header_length)

    def is_read_apart(self, loaded: Loaded) -> bool:
        length = self._head.header_length
        return loaded.codec.has_strings or length is None or length > INLINE_READ_BYTES

    def read_large(self, loaded: Loaded, stop: StopSignal) -> InferRequest:
        return loaded.codec.read_large(self._message or b"", self._head.header_length, lambda: check(stop))

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> InferResponse | None:
        return loaded.codec.write(request, outputs)

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> InferResponse:
        return loaded.codec.write_large(request, outputs, lambda: check(stop))

    def headers_of(self, loaded: Loaded) -> tuple[Header, ...]:
        """Returns the headers of a response without binary tensors."""
        return loaded.json_headers

    def size(self, answer: InferResponse) -> int:
        return len(answer.body)

    def send(self, loaded: Loaded, answer: InferResponse) -> None:
        body, header_length = answer
        if header_length is None:
            headers = self.headers_of(loaded)
        else:
            length = (b"inference-header-content-length", b"%d" % header_length)
            headers = (BINARY, *loaded.headers, length)
        reply = tuple.__new__(Reply, (200, headers, body))  # same as Reply(...), which is a Python function
        if self._head.accept_encoding and len(body) >= MIN_BYTES:
            _compress(reply, self._head.accept_encoding, self._respond, self._owner.workers)
        else:
            self._respond(reply)

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        self._respond(error_reply(error, headers))


def _compress(reply: Reply, accept_encoding: bytes, respond: Respond, workers: Workers) -> None:
    """Compresses in a thread: half a megabyte would block the loop for 15 ms."""

    def packed(result: tuple[bytes, bytes | None] | None, error: Exception | None) -> None:
        if result is None:
            respond(reply)
            return
        body, encoding = result
        headers = reply.headers if encoding is None else (*reply.headers, (b"content-encoding", encoding))
        respond(Reply(reply.status, headers, body))

    try:
        workers.submit(lambda stop: deflate(reply.body, accept_encoding), len(reply.body), packed)
    except Overloaded:
        respond(reply)
