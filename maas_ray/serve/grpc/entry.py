"""Where Ray Serve comes in: the function that adds the service's methods to each gRPC server that Serve starts.

In a replica that has a gRPC server of its own (profile fast) the methods run right on that server; measured, that takes
half of the time of Serve's way, which wraps each request. On the server of a proxy (profile portable) they only have
names: Serve routes each to the replica's method of the same name, which gives the same answers. A proxy imports this
file and nothing behind it.
"""

import asyncio
from typing import Any

import grpc

from maas_ray.serve.grpc.exposure import limit_messages

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

_here: list[tuple[grpc.GenericRpcHandler, asyncio.AbstractEventLoop]] = []


def register(handlers: grpc.GenericRpcHandler, max_body_bytes: int) -> None:
    """Says that this process is a replica of ours; called on its loop before Serve starts its servers.

    Args:
        handlers: all methods.
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
        server.add_passthrough_service(SERVICE)
        server.add_generic_rpc_handlers((_here[0][0],))
        return
    methods = {name: grpc.unary_unary_rpc_method_handler(_nowhere) for name in UNARY}
    methods[STREAM] = grpc.stream_stream_rpc_method_handler(_nowhere)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


def _nowhere(*_: object) -> None:
    raise NotImplementedError("Serve answers this method in a replica")
