"""One inference request as its transport hands it over, and the two interfaces through which it is answered.

The life cycle (call.py) needs nothing else of a transport: a `Request` is built once from what was received, its
`WireFormat` converts between messages and tensors, and a `Responder` sends the result.
"""

from typing import Generic, NamedTuple, Protocol, TypeVar

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import MaasError
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.request.head import Header
from maas_ray.serve.wire.checks import InferRequest

MessageT = TypeVar("MessageT")
AnswerT = TypeVar("AnswerT")
_MessageT = TypeVar("_MessageT", contravariant=True)
_AnswerT = TypeVar("_AnswerT", contravariant=True)


class WireFormat(Protocol[_MessageT, AnswerT]):
    """Converts messages of one kind to tensors, and outputs to answers. It keeps nothing of a request."""

    def may_have_priority(self, message: _MessageT) -> bool:
        """Whether a message may contain a priority; evaluated before it is parsed."""
        ...

    def is_slow_to_read(self, loaded: Loaded, message: _MessageT) -> bool:
        """Whether a message of more than `INLINE_READ_BYTES` may take long to parse, so that a thread does it."""
        ...

    def read(self, loaded: Loaded, message: _MessageT) -> InferRequest:
        """Returns the request as tensors that match the model's signature."""
        ...

    def read_large(self, loaded: Loaded, message: _MessageT, stop: StopSignal) -> InferRequest:
        """As `read`, in a thread; ends early once `stop` is set."""
        ...

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> AnswerT | None:
        """Returns the answer; None if writing it takes so long that a thread must do it."""
        ...

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> AnswerT:
        """As `write`, in a thread; ends early once `stop` is set."""
        ...

    def num_bytes(self, answer: AnswerT) -> int:
        """Returns the bytes of an answer."""
        ...


class Responder(Protocol[_AnswerT]):
    """Receives the result of one request: one call of one method, unless the request is cancelled before."""

    def send(self, answer: _AnswerT) -> None:
        """Sends an answer."""
        ...

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        """Sends an error, with the headers of the model version, if one was found."""
        ...


class Request(NamedTuple, Generic[MessageT, AnswerT]):
    """One inference request: what its transport knows before the model is found."""

    model: str
    """Name of the model."""
    version: int | None
    """Version of the model; None: the version of its alias."""
    message: MessageT
    """Message as received, not compressed; it is parsed once the model is in memory."""
    num_bytes: int
    """Bytes of the message."""
    deadline: float
    """Time on the loop's clock after which the answer is not wanted."""
    request_id: bytes
    """Id for the response, the log and the traces."""
    traceparent: bytes
    """W3C trace context of the client; empty if there is none."""
    format: WireFormat[MessageT, AnswerT]
    """How the message is read and the answer is written."""
