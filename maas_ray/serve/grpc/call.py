"""One `ModelInferRequest` between its bytes and its answer: the handler's way, with messages. Knows no server."""

import asyncio
from weakref import WeakKeyDictionary

from maas_ray.errors import MaasError
from maas_ray.serve.grpc.codec import MessageCodec, ModelInfer, Part
from maas_ray.serve.handler import Call, Handler
from maas_ray.serve.head import Head, Header
from maas_ray.serve.queue import Tensors
from maas_ray.serve.residency import Loaded
from maas_ray.serve.wire.checks import InferRequest

Result = tuple[list[Part], tuple[Header, ...]]
"""A `ModelInferResponse` in parts, and the headers of the version that gave it."""


class GrpcCall(Call):
    """A request of the v2 protocol over gRPC.

    Args:
        handler: whose request it is.
        head: where it leads.
        request_id: what its answer will carry.
        message: the request.
        deadline: time of the loop's clock after which nobody waits.
        result: gets the answer or the error; not after `cancel`.
    """

    __slots__ = ("_headers", "_message", "_parts", "_result")

    def __init__(
        self, handler: Handler, head: Head, request_id: bytes, message: ModelInfer, deadline: float,
        result: "asyncio.Future[Result]",
    ) -> None:  # fmt: skip
        super().__init__(handler, head, request_id, message.num_bytes, deadline)
        self._message: ModelInfer | None = message
        self._result = result
        self._parts: list[Part] = []
        self._headers: tuple[Header, ...] = ()

    def has_priority(self) -> bool:
        return self._message is not None and "priority" in (self._message.parameters or {})

    def read(self, loaded: Loaded) -> InferRequest:
        message, self._message = self._message, None  # large tensors hold their own part of it
        if message is None:
            raise MaasError("the request has been read already")
        return _codec_of(loaded).read_message(message)

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> int:
        self._headers = loaded.headers
        self._parts = _codec_of(loaded).write_message(request, outputs)
        return sum(part.nbytes if not isinstance(part, bytes) else len(part) for part in self._parts)

    def send(self) -> None:
        if not self._result.done():
            self._result.set_result((self._parts, self._headers))

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        if not self._result.done():
            self._result.set_exception(error)


_codecs: WeakKeyDictionary[Loaded, MessageCodec] = WeakKeyDictionary()


def _codec_of(loaded: Loaded) -> MessageCodec:
    codec = _codecs.get(loaded)
    if codec is None:
        codec = _codecs[loaded] = MessageCodec(loaded.version.model, loaded.version.version, loaded.info)
    return codec
