"""Where Ray Serve comes in: the function that adds the service's methods to each gRPC server that Serve starts.

In a replica that has a gRPC server of its own (profile fast) the methods run right on that server; measured, that takes
half of the time of Serve's way, which wraps each request. On the server of a proxy (profile portable) they only have
names: Serve routes each to the replica's method of the same name, which gives the same answers. A proxy imports this
file and nothing behind it.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc

from maas_ray.serve.grpc.exposure import limit_messages
from maas_ray.serve.grpc.proxy import route_unnamed

SERVICE = "inference.GRPCInferenceService"
UNARY = (
    "ModelInfer", "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig",
    "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
)  # fmt: skip
"""Methods with one request and one response."""
STREAM = "ModelStreamInfer"
"""The one with a stream of each."""
HEALTH = "grpc.health.v1.Health"
HEALTH_UNARY, HEALTH_STREAM = "Check", "Watch"
"""Methods of `HEALTH`; the second answers with a stream."""
REFLECTIONS = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

Handlers = Mapping[str, grpc.GenericRpcHandler]
"""All methods of a service, by its name."""

_here: list[tuple[Handlers, asyncio.AbstractEventLoop]] = []


def register(handlers: Handlers, max_body_bytes: int) -> None:
    """Says that this process is a replica of ours; called on its loop before Serve starts its servers.

    Args:
        handlers: of each service.
        max_body_bytes: the pool's limit.
    """
    _here[:] = [(handlers, asyncio.get_running_loop())]
    limit_messages(max_body_bytes)


def add_to_server(servicer: object, server: Any) -> None:
    """What `grpc_servicer_functions` names.

    Args:
        servicer: Serve's stand-in; not used.
        server: Serve's server, which passes on to a replica whatever is not said to run here.
    """
    if _here and _here[0][1] is asyncio.get_running_loop():
        _add(server, _here[0][0])
        return
    route_unnamed()
    methods = {name: grpc.unary_unary_rpc_method_handler(_nowhere) for name in UNARY}
    methods[STREAM] = grpc.stream_stream_rpc_method_handler(_nowhere)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    health = {
        HEALTH_UNARY: grpc.unary_unary_rpc_method_handler(_nowhere),
        HEALTH_STREAM: grpc.unary_stream_rpc_method_handler(_nowhere),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH, health),))
    # Here, where it is asked: descriptors are the same everywhere, and no pool need be named for them.
    from maas_ray.serve.grpc import reflection

    _add(server, {name: reflection.handlers(name) for name in REFLECTIONS})


def _add(server: Any, handlers: Handlers) -> None:
    """Makes services run right on a server of Serve's."""
    for name, handler in handlers.items():
        server.add_passthrough_service(name)
        server.add_generic_rpc_handlers((handler,))


def _nowhere(*_: object) -> None:
    raise NotImplementedError("Serve answers this method in a replica")
