"""Methods of the service as Ray Serve calls them in a replica, if a proxy has the gRPC server (profile portable)."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from maas_ray.serve.grpc.entry import HEALTH_STREAM, HEALTH_UNARY, STREAM, UNARY
from maas_ray.serve.grpc.server import Rpcs


class Serialized:
    """A message in the form that Serve accepts from a replica: an object that serializes itself."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def SerializeToString(self) -> bytes:  # noqa: N802
        """Returns the serialized message."""
        return self._body


class GrpcMethods:
    """Base of a deployment class: one method per RPC of the service. Serve passes the bytes and a context."""

    rpcs: Rpcs
    """Set by the deployment class."""


def _unary(name: str) -> Callable[[GrpcMethods, bytes, Any], Awaitable[Serialized]]:
    async def method(self: GrpcMethods, body: bytes, grpc_context: Any) -> Serialized:
        return Serialized(await self.rpcs.unary(name, body, grpc_context))

    return method


async def _stream(self: GrpcMethods, bodies: AsyncIterator[bytes], grpc_context: Any) -> AsyncIterator[Serialized]:
    async for body in self.rpcs.stream(bodies, grpc_context):
        yield Serialized(body)


async def _watch(self: GrpcMethods, body: bytes, grpc_context: Any) -> AsyncIterator[Serialized]:
    async for answer in self.rpcs.watch(body, grpc_context):
        yield Serialized(answer)


for _name in (*UNARY, HEALTH_UNARY):
    setattr(GrpcMethods, _name, _unary(_name))
setattr(GrpcMethods, STREAM, _stream)
setattr(GrpcMethods, HEALTH_STREAM, _watch)
