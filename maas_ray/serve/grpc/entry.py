"""Entry point for Ray Serve: the function that adds the service's methods to each gRPC server that Serve starts.

In a replica with its own gRPC server (profile fast) the methods run directly on that server, which takes half the time
of Serve's path, which wraps each request (measured). On the server of a proxy (profile portable) only their names are
registered: Serve routes each to the replica's method of the same name, with the same responses. A proxy imports this
file and nothing else of the package.
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
"""The method with a stream in both directions."""
HEALTH = "grpc.health.v1.Health"
HEALTH_UNARY, HEALTH_STREAM = "Check", "Watch"
"""Methods of `HEALTH`; the second one has a response stream."""
REFLECTIONS = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

Handlers = Mapping[str, grpc.GenericRpcHandler]
"""All methods of a service, by its name."""

_here: list[tuple[Handlers, asyncio.AbstractEventLoop]] = []


def register(handlers: Handlers, max_body_bytes: int) -> None:
    """Marks this process as a replica of ours; called on its loop before Serve starts its servers.

    Args:
        handlers: handler of each service.
        max_body_bytes: limit of the pool.
    """
    _here[:] = [(handlers, asyncio.get_running_loop())]
    limit_messages(max_body_bytes)


def add_to_server(servicer: object, server: Any) -> None:
    """Function for `grpc_servicer_functions`.

    Args:
        servicer: Serve's placeholder; not used.
        server: Serve's server, which forwards every method that is not registered here to a replica.
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
    # Answered in the proxy: descriptors are the same everywhere, and no pool need be named for them.
    from maas_ray.serve.grpc import reflection

    _add(server, {name: reflection.handlers(name) for name in REFLECTIONS})


def _add(server: Any, handlers: Handlers) -> None:
    """Registers services directly on a server of Serve's."""
    for name, handler in handlers.items():
        server.add_passthrough_service(name)
        server.add_generic_rpc_handlers((handler,))


def _nowhere(*_: object) -> None:
    raise NotImplementedError("Serve answers this method in a replica")
