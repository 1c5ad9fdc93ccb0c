"""Methods of `inference.GRPCInferenceService`: from a serialized message to a serialized message.

Inference uses the same life cycle as all requests (`request.call.Call`). Other methods call the HTTP route of the same
meaning, and convert its JSON to the message, whose fields have the same names: both protocols send the same responses.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import orjson
from google.protobuf.json_format import ParseDict

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, NotFound
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.call import GrpcCall, Result
from maas_ray.serve.grpc.codec import (
    ModelInfer,
    as_stream_response,
    is_quickly_parsed,
    join,
    parse,
    plain_parameters,
)
from maas_ray.serve.grpc.entry import HEALTH_UNARY
from maas_ray.serve.grpc.health import Health
from maas_ray.serve.grpc.outcome import CallOutcome, Refused
from maas_ray.serve.grpc.status import error_text
from maas_ray.serve.http.handler import Handler
from maas_ray.serve.request import unsupported_extensions
from maas_ray.serve.request.head import Head, Header, Route, too_large
from maas_ray.serve.spec.pools import LimitsSpec
from maas_ray.serve.wire.tensors import short

MAX_CONTROL_BYTES = 64 << 10
"""Maximum message that is not an inference; it is parsed on the loop."""
MAX_PIPELINED = 64
"""Maximum waiting and running requests of one stream; the next one is read once the oldest is answered."""

_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()
"""A request has one response here, so each response is the final one."""


class Caller(NamedTuple):
    """Metadata of a call."""

    request_id: bytes
    """Request id for the response."""
    deadline: float
    """Time on the loop's clock after which the response is not wanted; infinity if not set."""
    traceparent: bytes = b""
    wants_status: bool = False
    """Whether an error inside a stream must end it with a status (Triton: metadata `triton_grpc_error`)."""


PassOn = Callable[[bytes], Awaitable[CallOutcome | None]]
"""Passes a serialized `ModelInferRequest` to the pool that serves its model; None if that is this pool."""


class GrpcResponse(NamedTuple):
    """A serialized message, and the headers of its model version."""

    body: bytes
    headers: tuple[Header, ...] = ()


class _Question(NamedTuple):
    """A method and the HTTP route with the same response."""

    request: Any
    response: Any
    route: Callable[[Any], Route]
    body: Callable[[Any], Any] = lambda request: None
    """Returns the JSON body for the route."""
    answer: Callable[[Any], Any] = lambda document: document
    """Converts the JSON of the route to the JSON of the response."""


def _about_model(name: str) -> Callable[[Any], Route]:
    return lambda request: Route(name, "GET", request.name, _version(request.version))


def _control(name: str) -> Callable[[Any], Route]:
    return lambda request: Route(name, "POST", request.model_name)


def _parameters(request: Any) -> Any:
    # Parameters of a load are refused by name, whatever their value, and files do not fit into JSON.
    parameters = plain_parameters(request.parameters) or {}
    return {"parameters": {name: None if type(value) is bytes else value for name, value in parameters.items()}}


QUESTIONS: dict[str, _Question] = {
    "ServerLive": _Question(pb.ServerLiveRequest, pb.ServerLiveResponse, lambda request: Route("live", "GET")),
    "ServerReady": _Question(pb.ServerReadyRequest, pb.ServerReadyResponse, lambda request: Route("ready", "GET")),
    "ServerMetadata": _Question(
        pb.ServerMetadataRequest, pb.ServerMetadataResponse, lambda request: Route("server", "GET")
    ),
    "ModelReady": _Question(pb.ModelReadyRequest, pb.ModelReadyResponse, _about_model("model_ready")),
    "ModelMetadata": _Question(pb.ModelMetadataRequest, pb.ModelMetadataResponse, _about_model("model")),
    "ModelConfig": _Question(
        pb.ModelConfigRequest,
        pb.ModelConfigResponse,
        _about_model("config"),
        answer=lambda document: {"config": document},
    ),
    "ModelStatistics": _Question(pb.ModelStatisticsRequest, pb.ModelStatisticsResponse, _about_model("stats")),
    "RepositoryIndex": _Question(
        pb.RepositoryIndexRequest,
        pb.RepositoryIndexResponse,
        lambda request: Route("index", "POST"),
        body=lambda request: {"ready": request.ready},
        answer=lambda document: {"models": document},
    ),
    "RepositoryModelLoad": _Question(
        pb.RepositoryModelLoadRequest, pb.RepositoryModelLoadResponse, _control("load"), body=_parameters
    ),
    "RepositoryModelUnload": _Question(
        pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse, _control("unload"), body=_parameters
    ),
}
"""All methods except inference."""


class Service:
    """All methods of one replica.

    Args:
        handler: request handler.
        limits: limits of one request.
    """

    def __init__(self, handler: Handler, limits: LimitsSpec) -> None:
        self._handler = handler
        self._limits = limits
        self.health = Health(lambda: handler.manager.is_ready)

    async def answer(self, method: str, body: bytes, caller: Caller) -> GrpcResponse:
        """Answers one call of a method.

        Args:
            method: one of `entry.UNARY`, or `entry.HEALTH_UNARY`.
            body: serialized request.
            caller: metadata of the call.

        Raises:
            MaasError: the call is refused.
        """
        if method == "ModelInfer":
            pending = self._begin(body, caller)
            try:
                parts, headers = await pending.result
            finally:
                pending.cancel()
            return GrpcResponse(join(parts), headers)
        if method == HEALTH_UNARY:
            return GrpcResponse(self.health.check(body))
        if method in unsupported_extensions.RPCS:
            extension, kind = unsupported_extensions.RPCS[method]
            if kind == "refused":
                raise unsupported_extensions.refusal(extension)
            return GrpcResponse(b"")  # no regions, nothing to remove: a message without fields
        question = QUESTIONS[method]
        if len(body) > MAX_CONTROL_BYTES:
            raise too_large(len(body), MAX_CONTROL_BYTES)
        request = parse(question.request, body)
        try:
            document, headers = await self._ask(question, request, caller)
        except NotFound:
            if method != "ModelReady":
                raise
            document, headers = {"ready": False}, ()  # as Triton does
        message = ParseDict(question.answer(document), question.response(), ignore_unknown_fields=True)
        return GrpcResponse(message.SerializeToString(), headers)

    async def stream(
        self, bodies: AsyncIterator[bytes], caller: Caller, pass_on: PassOn | None = None
    ) -> AsyncIterator[bytes]:
        """Answers the requests of a stream (`ModelStreamInfer`) in order; several of them run at once.

        An error is a response like any other, after which the stream continues, as in Triton.

        Args:
            bodies: serialized requests.
            caller: metadata of the call.
            pass_on: for a stream whose requests may be for other pools; None: this pool answers them all.

        Raises:
            MaasError: a request is refused, if the client wants a status for it.
        """
        pipeline = _Pipeline()

        async def read() -> None:
            async for body in bodies:
                await pipeline.has_room()
                pipeline.add(self._begin(body, caller, pass_on))

        reader = asyncio.get_running_loop().create_task(read())
        reader.add_done_callback(pipeline.end)
        try:
            while (pending := await pipeline.oldest()) is not None:
                yield await self._stream_answer(pending, caller)
                pipeline.remove_oldest()
        finally:
            reader.cancel()
            pipeline.cancel()

    async def _stream_answer(self, pending: "_Pending", caller: Caller) -> bytes:
        try:
            parts, _ = await pending.result
        except MaasError as error:
            if caller.wants_status:
                raise
            refused = pb.ModelStreamInferResponse(error_message=error_text(error))
            refused.infer_response.id = pending.id  # identifies the request
            return bytes(refused.SerializeToString())
        if pending.asks_for_final:
            parts = [*parts, _FINAL]
        return join(as_stream_response(parts))

    def _begin(self, body: bytes, caller: Caller, pass_on: PassOn | None = None) -> "_Pending":
        pending = _Pending(asyncio.get_running_loop())
        deadline = self._deadline(caller)

        def start(request: ModelInfer) -> None:
            pending.id, pending.asks_for_final = request.id, request.asks_for_final
            if pass_on is None:
                self._start(pending, request, caller, deadline)
            else:
                pending.follow(self._route(pending, request, body, caller, deadline, pass_on))

        try:
            self._check_size(body)
            if is_quickly_parsed(body):
                start(ModelInfer(body))
            else:
                pending.parse_by(deadline, self._handler.workers.submit(
                    lambda stop: ModelInfer(body), len(body),
                    lambda request, error: self._parsed(pending, request, error, start),
                ))  # fmt: skip
        except MaasError as error:
            pending.refuse(error)
        return pending

    def _parsed(
        self,
        pending: "_Pending",
        request: ModelInfer | None,
        error: Exception | None,
        start: Callable[[ModelInfer], None],
    ) -> None:
        if pending.result.done():
            return
        pending.end_parsing()
        if request is None:
            pending.refuse(error or MaasError("the message was not parsed"))
            return
        try:
            start(request)
        except Exception as failure:
            pending.refuse(failure)

    async def _route(
        self, pending: "_Pending", request: ModelInfer, body: bytes, caller: Caller, deadline: float, pass_on: PassOn
    ) -> None:
        """Answers a request of a stream that names no pool: here, or in the pool that serves the model."""
        try:
            outcome = await pass_on(body)
            if outcome is None:
                self._start(pending, request, caller, deadline)
            elif outcome.code:
                pending.refuse(Refused(outcome))
            elif not pending.result.done():
                pending.result.set_result(([outcome.body], ()))
        except Exception as error:
            pending.refuse(error)

    def _start(self, pending: "_Pending", request: ModelInfer, caller: Caller, deadline: float) -> None:
        head = Head("POST", "", ())
        head.route = Route("infer", "POST", request.message.model_name, _version(request.message.model_version))
        head.traceparent = caller.traceparent
        pending.call = GrpcCall(
            self._handler, head, caller.request_id, request, request.num_bytes, deadline, pending.result
        )
        pending.call.start()

    async def _ask(self, question: _Question, request: Any, caller: Caller) -> tuple[Any, tuple[Header, ...]]:
        route = question.route(request)
        head = Head(route.method, "", ())
        head.route = route
        body, deadline = orjson.dumps(question.body(request) or {}), self._deadline(caller)
        try:
            async with asyncio.timeout_at(deadline):
                reply = await self._handler.answer(head, body, deadline)
        except TimeoutError:
            raise DeadlineExceeded("the response was not ready before the deadline; allow more time") from None
        return orjson.loads(reply.body), tuple(header for header in reply.headers if header[0].startswith(b"x-maas-"))

    def _deadline(self, caller: Caller) -> float:
        return min(caller.deadline, asyncio.get_running_loop().time() + self._limits.timeout_s)

    def _check_size(self, body: bytes) -> None:
        if len(body) > self._limits.max_body_bytes:
            raise too_large(len(body), self._limits.max_body_bytes)


class _Pending:
    """An inference request in progress; `result` receives its outcome."""

    __slots__ = ("_loop", "_parsing", "_task", "asks_for_final", "call", "id", "result")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.result: asyncio.Future[Result] = loop.create_future()
        self.call: GrpcCall | None = None
        self.id = ""
        self.asks_for_final = False
        self._parsing: tuple[StopSignal, asyncio.TimerHandle] | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, work: Coroutine[Any, Any, None]) -> None:
        """Starts the task that sets the result."""
        self._task = self._loop.create_task(work)

    def parse_by(self, deadline: float, stop: StopSignal) -> None:
        """Sets a deadline for the parsing of its message, which is in progress in a thread."""
        late = DeadlineExceeded("parsing the message exceeded the deadline; allow more time or send less data")
        self._parsing = stop, self._loop.call_at(deadline, self.refuse, late)

    def end_parsing(self) -> None:
        """Ends the parsing of its message."""
        if self._parsing is not None:
            stop, timer = self._parsing
            stop.set()
            timer.cancel()
            self._parsing = None

    def refuse(self, error: Exception) -> None:
        """Answers with an error."""
        self.end_parsing()
        if not self.result.done():
            self.result.set_exception(error)

    def cancel(self) -> None:
        """Cancels the request. Does nothing if it has been answered."""
        self.end_parsing()
        if self._task is not None:
            self._task.cancel()
        if self.call is not None:
            self.call.cancel()
        if self.result.done() and not self.result.cancelled():
            self.result.exception()  # retrieves the error, so that asyncio does not report it
        self.result.cancel()


class _Pipeline:
    """Requests of one stream in order, at most `MAX_PIPELINED`."""

    def __init__(self) -> None:
        self._requests: deque[_Pending] = deque()
        self._changed = asyncio.Event()
        self._has_ended = False
        self._failure: BaseException | None = None

    async def has_room(self) -> None:
        while len(self._requests) >= MAX_PIPELINED:
            self._changed.clear()
            await self._changed.wait()

    def add(self, pending: _Pending) -> None:
        self._requests.append(pending)
        self._changed.set()

    async def oldest(self) -> _Pending | None:
        """Waits for a request; returns None once the client has sent all requests and they have been answered."""
        while not self._requests:
            if self._failure is not None:
                raise self._failure
            if self._has_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._requests[0]

    def remove_oldest(self) -> None:
        self._requests.popleft()
        self._changed.set()

    def end(self, reader: "asyncio.Task[None]") -> None:
        """Marks the end of the requests."""
        self._failure = None if reader.cancelled() else reader.exception()
        self._has_ended = True
        self._changed.set()

    def cancel(self) -> None:
        for pending in self._requests:
            pending.cancel()


def _version(text: str) -> int | None:
    """Parses the version of a message; an empty one means the version of the model's alias."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise BadRequest(f"version {short(text)} is not a positive integer; RepositoryIndex lists the versions")
    return int(text)
