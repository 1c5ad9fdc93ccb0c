"""gRPC server reflection, v1 and v1alpha, for clients such as grpcurl. Answers from descriptors only.

Source: github.com/grpc/grpc, src/proto/grpc/reflection/v1/reflection.proto. The protocol's messages have their own
package here (for the reason in inference.proto); clients see them in the package `inference`, in a descriptor pool that
is used only for this. Both versions of the protocol are the same on the wire.
"""

from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import grpc
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from maas_ray.serve.grpc import inference_pb2
from maas_ray.serve.grpc.entry import HEALTH, REFLECTIONS, SERVICE, STREAM, UNARY

_FILE = "grpc_service.proto"
_OURS, _PROTOCOL = "maas_ray.inference", "inference"
_MAX_DEPENDENCIES = 100


def handlers(name: str) -> grpc.GenericRpcHandler:
    """Returns the service with a name of `REFLECTIONS`, for a server of grpc.aio."""
    method = grpc.stream_stream_rpc_method_handler(
        _answer,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})


async def _answer(requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
    async for request in requests:
        response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        try:
            if kind == "list_services":
                names = (SERVICE, HEALTH, *REFLECTIONS)
                response.list_services_response.service.extend(
                    reflection_pb2.ServiceResponse(name=name) for name in sorted(names)
                )
            elif kind == "file_by_filename":
                _add_file(response, descriptors().FindFileByName(request.file_by_filename))
            elif kind == "file_containing_symbol":
                _add_file(response, descriptors().FindFileContainingSymbol(request.file_containing_symbol))
            elif kind == "all_extension_numbers_of_type":  # proto3: none
                descriptors().FindMessageTypeByName(request.all_extension_numbers_of_type)
                response.all_extension_numbers_response.base_type_name = request.all_extension_numbers_of_type
            else:
                _refuse(response, grpc.StatusCode.NOT_FOUND, "this server has no extensions")
        except KeyError:
            _refuse(response, grpc.StatusCode.NOT_FOUND, "this server has no such name")
        yield response


def _refuse(response: Any, code: grpc.StatusCode, message: str) -> None:
    response.error_response.error_code = code.value[0]
    response.error_response.error_message = message


def _add_file(response: Any, file: Any) -> None:
    """Adds a file and its dependencies, so that a client need not request those."""
    found = {file.name: file}
    waiting = [file]
    while waiting and len(found) < _MAX_DEPENDENCIES:
        for needed in waiting.pop().dependencies:
            if needed.name not in found:
                found[needed.name] = needed
                waiting.append(needed)
    response.file_descriptor_response.file_descriptor_proto.extend(one.serialized_pb for one in found.values())


@cache
def descriptors() -> descriptor_pool.DescriptorPool:
    """Returns the descriptors that clients see."""
    pool = descriptor_pool.DescriptorPool()
    for file in (any_pb2, duration_pb2, health_pb2, reflection_pb2):
        pool.AddSerializedFile(file.DESCRIPTOR.serialized_pb)
    pool.Add(
        _renamed(reflection_pb2, "grpc/reflection/v1/reflection.proto", "grpc.reflection.v1alpha", "grpc.reflection.v1")
    )
    protocol = _renamed(inference_pb2, _FILE, _OURS, _PROTOCOL)
    service = protocol.service.add(name=SERVICE.rpartition(".")[2])
    for name in (*UNARY, STREAM):
        request = "ModelInfer" if name == STREAM else name
        if request not in {message.name.removesuffix("Request") for message in protocol.message_type}:
            for end in ("Request", "Response"):  # an extension whose messages are not parsed here
                protocol.message_type.add(name=f"{name}{end}")
        is_stream = name == STREAM
        service.method.add(
            name=name,
            input_type=f".{_PROTOCOL}.{request}Request",
            output_type=f".{_PROTOCOL}.{name}Response",
            client_streaming=is_stream,
            server_streaming=is_stream,
        )
    pool.Add(protocol)
    return pool


def _renamed(module: Any, file: str, package: str, new_package: str) -> Any:
    """Returns a file's descriptor in another package."""
    text = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    text.name, text.package = file, new_package
    messages = list(text.message_type)
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        for field in message.field:
            if field.type_name.startswith(f".{package}."):
                field.type_name = f".{new_package}{field.type_name.removeprefix(f'.{package}')}"
    for service in text.service:
        for method in service.method:
            method.input_type = f".{new_package}{method.input_type.removeprefix(f'.{package}')}"
            method.output_type = f".{new_package}{method.output_type.removeprefix(f'.{package}')}"
    return text
