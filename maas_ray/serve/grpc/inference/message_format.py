"""Format of inference over gRPC: a `ModelInferRequest` to tensors, and outputs to a `ModelInferResponse`."""

from weakref import WeakKeyDictionary

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.grpc.inference.codec import MessageCodec
from maas_ray.serve.grpc.inference.message import ModelInfer, Part, num_bytes
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.offload import check
from maas_ray.serve.wire.checks import InferRequest

Result = tuple[list[Part], tuple[Header, ...]]
"""Parts of a `ModelInferResponse`, and the headers of its model version."""


class MessageFormat:
    """Requests and responses of `ModelInfer`."""

    def __init__(self) -> None:
        self._codecs: WeakKeyDictionary[Loaded, MessageCodec] = WeakKeyDictionary()

    def may_have_priority(self, message: ModelInfer) -> bool:
        return "priority" in (message.parameters or {})

    def is_slow_to_read(self, loaded: Loaded, message: ModelInfer) -> bool:
        return loaded.codec.has_strings or not message.raw

    def read(self, loaded: Loaded, message: ModelInfer) -> InferRequest:
        return self._codec(loaded).read_message(message)

    def read_large(self, loaded: Loaded, message: ModelInfer, stop: StopSignal) -> InferRequest:
        return self.read(loaded, message)

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> Result | None:
        parts = self._codec(loaded).write_message(request, outputs)
        return None if parts is None else (parts, loaded.headers)

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> Result:
        return self._codec(loaded).write_large(request, outputs, lambda: check(stop)), loaded.headers

    def num_bytes(self, answer: Result) -> int:
        return num_bytes(answer[0])

    def _codec(self, loaded: Loaded) -> MessageCodec:
        codec = self._codecs.get(loaded)
        if codec is None:
            version = loaded.version
            codec = self._codecs[loaded] = MessageCodec(
                version.model, version.version, loaded.info, loaded.max_answer_bytes
            )
        return codec
