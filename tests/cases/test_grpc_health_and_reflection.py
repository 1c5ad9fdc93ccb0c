"""Kubernetes' gRPC probes and grpcurl found neither `grpc.health.v1` nor reflection."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import uvloop
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2

from maas_ray.serve.grpc.entry import HEALTH, REFLECTIONS, SERVICE
from maas_ray.serve.grpc.methods import GrpcMethods
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.handler import Handler
from maas_ray.store.objects import ObstoreStore, open_store
from tests.serve.conftest import app_spec, publish
from tests.support.onnx_models import LINEAR, commit_bundle, linear, lookup

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@dataclass
class Server:
    channel: grpc.Channel
    store: ObstoreStore
    manager: ModelManager
    call: Callable[[Any], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('health')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    spec = app_spec(store, "linear", strict_readiness=True)
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    loop = runner.get_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def start() -> tuple[Any, int, ModelManager]:
        manager = ModelManager(store, spec)
        await manager.start()
        rpcs = Rpcs(Service(Handler(manager), spec.limits), "pool")
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(tuple(rpcs.services().values()))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port, manager

    running, port, manager = call(start())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Server(channel, store, manager, call)
    call(running.stop(0))
    call(manager.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    runner.close()


@pytest.mark.parametrize("service", ["", SERVICE, HEALTH])
def test_a_probe_of_a_known_service_gets_its_status(server: Server, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status == SERVING


def test_a_probe_of_an_unknown_service_gets_not_found(server: Server) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=20)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    answers = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"), timeout=20)
    assert next(answers).status == UNKNOWN
    answers.cancel()


def test_a_watcher_receives_each_change(server: Server) -> None:
    answers = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
    assert next(answers).status == SERVING
    broken = publish(server.store, "linear", commit_bundle(server.store, lookup(), LINEAR))
    server.call(server.manager.refresh())
    assert next(answers).status == NOT_SERVING, f"version {broken} cannot be loaded, and readiness is strict"
    publish(server.store, "linear", commit_bundle(server.store, linear(3.0)))
    server.call(server.manager.refresh())
    assert next(answers).status == SERVING
    answers.cancel()


def test_a_caller_of_another_pool_gets_no_answer(server: Server) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=20, metadata=[("application", "other")])
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_protocol_by_its_own_names(server: Server) -> None:
    database = ProtoReflectionDescriptorDatabase(server.channel)
    assert set(database.get_services()) == {SERVICE, HEALTH, *REFLECTIONS}
    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName(SERVICE)
    assert {"ModelInfer", "ModelStreamInfer", "ServerLive", "TraceSetting"} <= set(service.methods_by_name)
    stream = service.methods_by_name["ModelStreamInfer"]
    assert stream.client_streaming
    assert stream.server_streaming
    method = service.methods_by_name["ModelInfer"]
    assert method.input_type.full_name == service_pb2.ModelInferRequest.DESCRIPTOR.full_name
    # A client with only these descriptors can call the service.
    request = GetMessageClass(method.input_type)(model_name="linear")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 2, 3])
    ask = server.channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    assert len(ask(request, timeout=20).raw_output_contents[0]) == 12
    assert set(pool.FindServiceByName(HEALTH).methods_by_name) == {"Check", "Watch"}


@pytest.mark.parametrize("version", REFLECTIONS)
@pytest.mark.parametrize(
    ("question", "field"),
    [
        ({"list_services": "*"}, "list_services_response"),
        ({"file_containing_symbol": "inference.ModelInferRequest.InferInputTensor"}, "file_descriptor_response"),
        ({"file_containing_symbol": "grpc.reflection.v1.ServerReflection"}, "file_descriptor_response"),
        ({"file_by_filename": "google/protobuf/any.proto"}, "file_descriptor_response"),
        ({"all_extension_numbers_of_type": "inference.ModelInferRequest"}, "all_extension_numbers_response"),
        ({"file_by_filename": "etc/passwd"}, "error_response"),
        ({"file_containing_symbol": "maas_ray.inference.ModelInferRequest"}, "error_response"),
    ],
)
def test_both_versions_of_reflection_answer_alike(server: Server, version: str, question: Any, field: str) -> None:
    ask = server.channel.stream_stream(
        f"/{version}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=20)
    assert answer.WhichOneof("message_response") == field


def test_the_v1alpha_stub_of_grpc_itself_is_answered(server: Server) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=20)
    assert SERVICE in [service.name for service in answer.list_services_response.service]


def test_a_replica_behind_a_proxy_has_the_methods_of_health() -> None:
    assert callable(GrpcMethods.Check)  # type: ignore[attr-defined]
    assert callable(GrpcMethods.Watch)  # type: ignore[attr-defined]
