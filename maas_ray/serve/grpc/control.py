"""Methods of everything but inference: health of the server and its models, metadata, statistics, and the repository."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from maas_ray.errors import NotFound
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc import metadata
from maas_ray.serve.grpc.caller import read_version
from maas_ray.serve.grpc.inference.message import plain_parameters
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.head import Header

Answer = tuple[Any, tuple[Header, ...]]
"""A message, and the headers of its model version."""


class ControlMethod(NamedTuple):
    """A method and its implementation."""

    request: Any
    """Class of its request."""
    answer: Callable[[Handler, Any, float], Awaitable[Answer]]
    """Returns the response to a request, by a deadline on the loop's clock."""


async def _server_live(handler: Handler, request: Any, deadline: float) -> Answer:
    return pb.ServerLiveResponse(live=True), ()


async def _server_ready(handler: Handler, request: Any, deadline: float) -> Answer:
    return pb.ServerReadyResponse(ready=handler.descriptions.is_ready), ()


async def _server_metadata(handler: Handler, request: Any, deadline: float) -> Answer:
    return metadata.server_metadata(handler.descriptions.server()), ()


async def _model_ready(handler: Handler, request: Any, deadline: float) -> Answer:
    version = read_version(request.version)
    try:
        model = handler.descriptions.readiness(request.name, version)
    except NotFound:
        return pb.ModelReadyResponse(ready=False), ()  # as Triton does
    return pb.ModelReadyResponse(ready=model.is_ready), model.headers


async def _model_metadata(handler: Handler, request: Any, deadline: float) -> Answer:
    model, headers = await handler.descriptions.metadata(request.name, read_version(request.version), deadline)
    return metadata.model_metadata(model), headers


async def _model_config(handler: Handler, request: Any, deadline: float) -> Answer:
    config, headers = await handler.descriptions.config(request.name, read_version(request.version), deadline)
    return metadata.model_config(config), headers


async def _model_statistics(handler: Handler, request: Any, deadline: float) -> Answer:
    models = await handler.pool.statistics(request.name, read_version(request.version))
    return metadata.statistics(models), ()


async def _repository_index(handler: Handler, request: Any, deadline: float) -> Answer:
    return metadata.index(await handler.pool.index(ready_only=request.ready)), ()


async def _model_load(handler: Handler, request: Any, deadline: float) -> Answer:
    await handler.pool.load(request.model_name, _parameters(request))
    return pb.RepositoryModelLoadResponse(), ()


async def _model_unload(handler: Handler, request: Any, deadline: float) -> Answer:
    await handler.pool.unload(request.model_name, _parameters(request))
    return pb.RepositoryModelUnloadResponse(), ()


def _parameters(request: Any) -> dict[str, Any]:
    # Files are refused by name, so their contents are not needed.
    parameters = plain_parameters(request.parameters) or {}
    return {name: None if type(value) is bytes else value for name, value in parameters.items()}


CONTROL_METHODS: dict[str, ControlMethod] = {
    "ServerLive": ControlMethod(pb.ServerLiveRequest, _server_live),
    "ServerReady": ControlMethod(pb.ServerReadyRequest, _server_ready),
    "ServerMetadata": ControlMethod(pb.ServerMetadataRequest, _server_metadata),
    "ModelReady": ControlMethod(pb.ModelReadyRequest, _model_ready),
    "ModelMetadata": ControlMethod(pb.ModelMetadataRequest, _model_metadata),
    "ModelConfig": ControlMethod(pb.ModelConfigRequest, _model_config),
    "ModelStatistics": ControlMethod(pb.ModelStatisticsRequest, _model_statistics),
    "RepositoryIndex": ControlMethod(pb.RepositoryIndexRequest, _repository_index),
    "RepositoryModelLoad": ControlMethod(pb.RepositoryModelLoadRequest, _model_load),
    "RepositoryModelUnload": ControlMethod(pb.RepositoryModelUnloadRequest, _model_unload),
}
"""All methods except inference."""
