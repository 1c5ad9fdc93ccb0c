"""One `ModelInferRequest` from its bytes to its response: an inference call with messages. Independent of servers."""

import asyncio
from weakref import WeakKeyDictionary

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import MaasError
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.grpc.codec import MessageCodec, ModelInfer, Part
from maas_ray.serve.models.manager import Loaded
from maas_ray.serve.request.call import Call
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.offload import check
from maas_ray.serve.wire.checks import InferRequest

Result = tuple[list[Part], tuple[Header, ...]]
"""Parts of a `ModelInferResponse`, and the headers of its model version."""


class GrpcCall(Call[ModelInfer, asyncio.Future[Result], Result]):
    """A message, and the future that receives the response or the error."""

    __slots__ = ()

    def has_priority(self) -> bool:
        return self._message is not None and "priority" in (self._message.parameters or {})

    def read(self, loaded: Loaded) -> InferRequest:
        if self._message is None:
            raise MaasError("the request was already read")
        return _codec_of(loaded).read_message(self._message)

    def is_read_apart(self, loaded: Loaded) -> bool:
        return loaded.codec.has_strings or self._message is None or not self._message.raw

    def read_large(self, loaded: Loaded, stop: StopSignal) -> InferRequest:
        return self.read(loaded)

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> Result | None:
        parts = _codec_of(loaded).write_message(request, outputs)
        return None if parts is None else (parts, loaded.headers)

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> Result:
        return _codec_of(loaded).write_large(request, outputs, lambda: check(stop)), loaded.headers

    def size(self, answer: Result) -> int:
        return sum(part.nbytes if not isinstance(part, bytes) else len(part) for part in answer[0])

    def send(self, loaded: Loaded, answer: Result) -> None:
        if not self._respond.done():
            self._respond.set_result(answer)

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        if not self._respond.done():
            self._respond.set_exception(error)


_codecs: WeakKeyDictionary[Loaded, MessageCodec] = WeakKeyDictionary()


def _codec_of(loaded: Loaded) -> MessageCodec:
    codec = _codecs.get(loaded)
    if codec is None:
        codec = _codecs[loaded] = MessageCodec(
            loaded.version.model, loaded.version.version, loaded.info, loaded.max_answer_bytes
        )
    return codec
