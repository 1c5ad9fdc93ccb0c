"""gRPC service on a server of grpc.aio: contexts, statuses and metadata. Independent of Ray."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc

from maas_ray.display import get_logger
from maas_ray.errors import MaasError, NotFound
from maas_ray.haproxy.names import UNNAMED_HEADER
from maas_ray.serve.front.replica_access import refusal
from maas_ray.serve.grpc import reflection
from maas_ray.serve.grpc.caller import Caller, read_caller
from maas_ray.serve.grpc.entry import HEALTH, HEALTH_STREAM, HEALTH_UNARY, REFLECTIONS, SERVICE, STREAM, UNARY
from maas_ray.serve.grpc.inference.infer import PassOn
from maas_ray.serve.grpc.outcome import CallOutcome
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.grpc.status import CODES, status_of
from maas_ray.serve.grpc.unnamed import APPLICATION, Carried, Unnamed
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.response import internal_error

log = get_logger(__name__)


class Rpcs:
    """RPC methods as gRPC calls them: from bytes and a context to bytes, a status and trailing metadata.

    Args:
        service: methods of the service.
        application: name of the pool; calls that name another one are refused. Empty: none are.
        unnamed: finds the pool for calls that name none; None: this pool answers them all.
        is_from_front: checks by a call's metadata whether it has passed the front; None: no check.
    """

    def __init__(
        self,
        service: Service,
        application: str = "",
        unnamed: Unnamed | None = None,
        is_from_front: Callable[[Iterable[Header]], bool] | None = None,
    ) -> None:
        self._service = service
        self._is_from_front = is_from_front
        self._application = application
        self._unnamed = unnamed

    async def unary(self, method: str, body: bytes, context: Any) -> bytes:
        """Answers a call; an error becomes the context's status.

        Args:
            method: one of `UNARY`, or `HEALTH_UNARY`.
            body: serialized request.
            context: context of grpc.aio, or Ray Serve's equivalent.
        """
        caller = read_caller(context)
        try:
            if self._check_application(context) and self._unnamed is not None:
                outcome = await self._unnamed.pass_on(method, body, context, caller.request_id)
                if outcome is not None:
                    return _pass_back(context, outcome)
            answer = await self._service.answer(method, body, caller)
        except Exception as error:
            _fail(context, error, caller)
            return b""  # gRPC sends no message with an error status
        context.set_trailing_metadata(_metadata(caller, answer.headers))
        return answer.body

    async def carry(self, method: str, body: bytes, metadata: Mapping[str, str], timeout_s: float) -> CallOutcome:
        """Answers a call that another pool has forwarded to this one; it is not forwarded again.

        Args:
            method: one of `UNARY`.
            body: serialized request.
            metadata: metadata of the client; names this pool.
            timeout_s: remaining time of the client.
        """
        context = Carried(metadata, timeout_s)
        return context.outcome(await self.unary(method, body, context))

    async def stream(self, bodies: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answers a stream; an error that ends it becomes the context's status."""
        caller = read_caller(context)
        try:
            pass_on: PassOn | None = None
            if self._check_application(context) and (unnamed := self._unnamed) is not None:
                pass_on = lambda body: unnamed.pass_on("ModelInfer", body, context, caller.request_id)  # noqa: E731
            async for answer in self._service.stream(bodies, caller, pass_on):
                yield answer
        except Exception as error:
            _fail(context, error, caller)
            return
        context.set_trailing_metadata(_metadata(caller, ()))

    async def watch(self, body: bytes, context: Any) -> AsyncIterator[bytes]:
        """Answers `Watch` of `grpc.health.v1`."""
        caller = read_caller(context)
        try:
            self._check_application(context)
            async for answer in self._service.health.watch(body):
                yield answer
        except Exception as error:
            _fail(context, error, caller)

    def services(self) -> dict[str, grpc.GenericRpcHandler]:
        """Returns every service of a replica by its name, for `entry.register`."""
        check = grpc.unary_unary_rpc_method_handler(self._unary(HEALTH_UNARY))
        health = {HEALTH_UNARY: check, HEALTH_STREAM: grpc.unary_stream_rpc_method_handler(self.watch)}
        return {
            SERVICE: self.handlers(),
            HEALTH: grpc.method_handlers_generic_handler(HEALTH, health),
            **{name: reflection.handlers(name) for name in REFLECTIONS},
        }

    def handlers(self) -> grpc.GenericRpcHandler:
        """Returns the protocol's service, for `add_generic_rpc_handlers` of grpc.aio servers. Messages stay bytes."""
        methods = {name: grpc.unary_unary_rpc_method_handler(self._unary(name)) for name in UNARY}
        methods[STREAM] = grpc.stream_stream_rpc_method_handler(self.stream)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _unary(self, method: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def answer(body: bytes, context: Any) -> bytes:
            return await self.unary(method, body, context)

        return answer

    def _check_application(self, context: Any) -> bool:
        """Whether there are several pools and the client named none; raises `NotFound` if it named another one."""
        metadata = dict(context.invocation_metadata() or ())
        headers = ((name.encode(), _as_bytes(value)) for name, value in metadata.items())
        if self._is_from_front is not None and not isinstance(context, Carried) and not self._is_from_front(headers):
            raise refusal()
        wanted = metadata.get(APPLICATION)
        if wanted is None:
            # HAProxy marks such calls. Serve's proxy, whose context has no deadline, cannot.
            return UNNAMED_HEADER in metadata or not hasattr(context, "time_remaining")
        if self._application and wanted != self._application:
            raise NotFound(f"this is pool {self._application!r}, the metadata 'application' is {wanted[:100]!r}")
        return False


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _pass_back(context: Any, outcome: CallOutcome) -> bytes:
    if outcome.code:
        context.set_code(CODES[outcome.code])
        context.set_details(outcome.details)
    context.set_trailing_metadata(list(outcome.trailing))
    return outcome.body


def _metadata(caller: Caller, headers: tuple[Header, ...]) -> list[tuple[str, str | bytes]]:
    return [("x-request-id", caller.request_id.decode()), *((name.decode(), value.decode()) for name, value in headers)]


def _fail(context: Any, error: Exception, caller: Caller) -> None:
    if not isinstance(error, MaasError):
        log.error("request %s failed unexpectedly", caller.request_id.decode(), exc_info=error)
        error = internal_error(caller.request_id)
    status = status_of(error)
    context.set_code(status.code)
    context.set_details(status.message)
    context.set_trailing_metadata([*_metadata(caller, ()), *status.metadata])
