"""Methods of `inference.GRPCInferenceService`: from a serialized message to a serialized message.

All of them use what HTTP uses: inference the same life cycle (request/call.py), everything else the same values
(request/descriptions.py, request/pool_operations.py).
"""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

from maas_ray.errors import DeadlineExceeded
from maas_ray.serve.grpc.caller import Caller
from maas_ray.serve.grpc.control import CONTROL_METHODS, ControlMethod
from maas_ray.serve.grpc.entry import HEALTH_UNARY
from maas_ray.serve.grpc.health import Health
from maas_ray.serve.grpc.inference.infer import GrpcInference, PassOn
from maas_ray.serve.grpc.inference.message import join, parse
from maas_ray.serve.request import unsupported_extensions
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.head import Header
from maas_ray.serve.request.limits import MAX_CONTROL_BYTES, check_size
from maas_ray.serve.spec.limits import LimitsSpec


class GrpcResponse(NamedTuple):
    """A serialized message, and the headers of its model version."""

    body: bytes
    headers: tuple[Header, ...] = ()


class Service:
    """All methods of one replica.

    Args:
        handler: request handler.
        limits: limits of one request.
    """

    def __init__(self, handler: Handler, limits: LimitsSpec) -> None:
        self._handler = handler
        self._limits = limits
        self._inference = GrpcInference(handler, limits)
        self.health = Health(lambda: handler.descriptions.is_ready)

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
            parts, headers = await self._inference.unary(body, caller)
            return GrpcResponse(join(parts), headers)
        if method == HEALTH_UNARY:
            return GrpcResponse(self.health.check(body))
        if method in unsupported_extensions.RPCS:
            extension, kind = unsupported_extensions.RPCS[method]
            if kind == "refused":
                raise unsupported_extensions.refusal(extension)
            return GrpcResponse(b"")  # no regions, nothing to remove: a message without fields
        return await self._control(CONTROL_METHODS[method], body, caller)

    def stream(
        self, bodies: AsyncIterator[bytes], caller: Caller, pass_on: PassOn | None = None
    ) -> AsyncIterator[bytes]:
        """Answers the requests of a stream (`ModelStreamInfer`); see `GrpcInference.stream`."""
        return self._inference.stream(bodies, caller, pass_on)

    async def _control(self, method: ControlMethod, body: bytes, caller: Caller) -> GrpcResponse:
        check_size(len(body), MAX_CONTROL_BYTES)
        request = parse(method.request, body)
        deadline = caller.deadline_within(self._limits.timeout_s)
        try:
            async with asyncio.timeout_at(deadline):
                message, headers = await method.answer(self._handler, request, deadline)
        except TimeoutError:
            raise DeadlineExceeded("the response was not ready before the deadline; allow more time") from None
        return GrpcResponse(message.SerializeToString(), headers)
