"""Inference over gRPC: single requests and streams of requests, as serialized messages. Independent of servers.

A message is parsed in a thread if that may take long, then answered as every other request (request/call.py).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from maas_ray.errors import MaasError
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.caller import Caller, read_version
from maas_ray.serve.grpc.inference.message import ModelInfer, as_stream_response, is_quickly_parsed, join
from maas_ray.serve.grpc.inference.message_format import MessageFormat, Result
from maas_ray.serve.grpc.inference.pending import Pending
from maas_ray.serve.grpc.inference.pipeline import RequestPipeline
from maas_ray.serve.grpc.outcome import CallOutcome, Refused
from maas_ray.serve.grpc.status import error_text
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.limits import check_size
from maas_ray.serve.request.request import Request
from maas_ray.serve.spec.limits import LimitsSpec

_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()
"""A request has one response here, so each response is the final one."""

PassOn = Callable[[bytes], Awaitable[CallOutcome | None]]
"""Passes a serialized `ModelInferRequest` to the pool that serves its model; None if that is this pool."""


class GrpcInference:
    """`ModelInfer` and `ModelStreamInfer` of one replica.

    Args:
        handler: request handler.
        limits: limits of one request.
    """

    def __init__(self, handler: Handler, limits: LimitsSpec) -> None:
        self._handler = handler
        self._limits = limits
        self._format = MessageFormat()

    async def unary(self, body: bytes, caller: Caller) -> Result:
        """Answers a `ModelInferRequest`.

        Raises:
            MaasError: the request is refused.
        """
        pending = self._begin(body, caller)
        try:
            return await pending.result
        finally:
            pending.close()

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
        pipeline = RequestPipeline()

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
            pipeline.close()

    async def _stream_answer(self, pending: Pending, caller: Caller) -> bytes:
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

    def _begin(self, body: bytes, caller: Caller, pass_on: PassOn | None = None) -> Pending:
        pending = Pending(asyncio.get_running_loop())
        deadline = caller.deadline_within(self._limits.timeout_s)

        def start(request: ModelInfer) -> None:
            pending.id, pending.asks_for_final = request.id, request.asks_for_final
            if pass_on is None:
                self._start(pending, request, caller, deadline)
            else:
                pending.follow(self._route(pending, request, body, caller, deadline, pass_on))

        try:
            check_size(len(body), self._limits.max_body_bytes)
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
        pending: Pending,
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
        self, pending: Pending, request: ModelInfer, body: bytes, caller: Caller, deadline: float, pass_on: PassOn
    ) -> None:
        """Answers a request of a stream that names no pool: here, or in the pool that serves the model."""
        try:
            outcome = await pass_on(body)
            if outcome is None:
                self._start(pending, request, caller, deadline)
            elif outcome.code:
                pending.refuse(Refused(outcome))
            else:
                pending.send(([outcome.body], ()))
        except Exception as error:
            pending.refuse(error)

    def _start(self, pending: Pending, request: ModelInfer, caller: Caller, deadline: float) -> None:
        message = request.message
        pending.call = self._handler.infer(
            Request(
                message.model_name, read_version(message.model_version), request, request.num_bytes, deadline,
                caller.request_id, caller.traceparent, self._format,
            ),
            pending,
        )  # fmt: skip
