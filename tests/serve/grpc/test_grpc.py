"""The service on a real gRPC server, called by Triton's own client."""

import asyncio
import gc
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import uvloop
from tritonclient import grpc as triton
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import TensorSpec
from maas_ray.errors import DeadlineExceeded, SpecError
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.caller import Caller
from maas_ray.serve.grpc.control import CONTROL_METHODS
from maas_ray.serve.grpc.entry import SERVICE, STREAM, UNARY
from maas_ray.serve.grpc.inference.pending import Pending
from maas_ray.serve.grpc.inference.pipeline import MAX_PIPELINED
from maas_ray.serve.grpc.methods import GrpcMethods
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.unsupported_extensions import RPCS
from maas_ray.serve.spec.serve import GrpcSpec, ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, publish
from tests.support.bundles import toy_info
from tests.support.infer_messages import Value, changed, message
from tests.support.onnx_models import LOOKUP, MIXED, commit_bundle, linear, lookup, mixed


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"grpc": {"port": 8000}}, "http and grpc have the same port 8000"),
        ({"grpc": {"port": 0}}, "greater than or equal to 1"),
        ({"grpc": {}, "profile": "portable", "http": {"tls": {"certificate": "c", "key": "k"}}}, "stay plain text"),
    ],
)
def test_what_grpc_cannot_be_is_refused(more: dict[str, Any], reason: str) -> None:
    described = {"pools": [{"models": [{"name": "m"}]}]}
    assert parse_spec(ServeSpec, described).grpc is None
    assert parse_spec(ServeSpec, {**described, "grpc": {}}).grpc == GrpcSpec(port=9000)
    with pytest.raises(SpecError, match=reason):
        parse_spec(ServeSpec, described | more)


@dataclass
class Server:
    """The service on grpc.aio's server, on a loop in a thread as in a replica."""

    address: str
    manager: ModelManager
    handler: Handler
    loop: asyncio.AbstractEventLoop
    call: Callable[[Any], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('grpc')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0), run="run-a"))
    publish(store, "mixed", commit_bundle(store, mixed(), MIXED, run="run-b"))
    publish(store, "lookup", commit_bundle(store, lookup(), LOOKUP, run="run-c"))
    publish(store, "wide", commit_bundle(store, *wide(), run="run-d"))
    spec = app_spec(store, "linear", "mixed", "lookup", "wide", limits={"timeout_s": 20, "max_body_bytes": 20 << 20})
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    loop = runner.get_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def start() -> tuple[Any, int, ModelManager, Handler]:
        manager = ModelManager(store, spec)
        await manager.start()
        handler = Handler(manager)
        # As Ray Serve starts its own: without a limit worth the name, so ours is the one that counts.
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((Rpcs(Service(handler, spec.limits), "pool").handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port, manager, handler

    running, port, manager, handler = call(start())
    yield Server(f"127.0.0.1:{port}", manager, handler, loop, call)
    call(running.stop(1))
    call(manager.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    runner.close()


def wide() -> tuple[bytes, Any]:
    tensors = [TensorSpec(name=name, datatype="FP32", shape=(-1, 1 << 20)) for name in ("x", "y")]
    signature = toy_info().signature.model_copy(update={"inputs": (tensors[0],), "outputs": (tensors[1],)})
    return linear(2.0, width=1 << 20), signature


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as client:
        yield client


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def tensor(array: Array, name: str = "x", datatype: str = "FP32") -> triton.InferInput:
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


ROW = np.array([[1, 2, 3]], np.float32)


def test_tritons_client_infers_with_its_defaults(client: triton.InferenceServerClient) -> None:
    answer = client.infer("linear", [tensor(ROW)], request_id="7", model_version="1", priority=1, timeout=10_000_000)
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * ROW)
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("linear", "1", "7")


def test_tritons_client_sends_strings_and_requests_outputs(client: triton.InferenceServerClient) -> None:
    inputs = [
        tensor(np.array([["green"], ["blue"]], dtype=object), "color", "BYTES"),
        tensor(np.array([[np.nan], [5]], np.float32), "age"),
    ]
    answer = client.infer("mixed", inputs, outputs=[triton.InferRequestedOutput("echo"), triton.InferRequestedOutput("shown")])  # fmt: skip
    assert answer.as_numpy("echo").tolist() == [[b"green"], [b"blue"]]
    assert answer.as_numpy("shown").tolist() == [[30.0], [5.0]]
    assert answer.as_numpy("code") is None


def test_tritons_client_requests_classes(client: triton.InferenceServerClient) -> None:
    answer = client.infer("linear", [tensor(ROW)], outputs=[triton.InferRequestedOutput("y", class_count=2)])
    assert answer.as_numpy("y").tolist() == [[b"6.000000:2", b"4.000000:1"]]


def test_tritons_client_infers_asynchronously_and_compressed(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    for _ in range(20):
        client.async_infer("linear", [tensor(ROW)], callback=lambda result, error: answers.put((result, error)))
    for _ in range(20):
        result, error = answers.get(timeout=20)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), 2 * ROW)
    packed = client.infer("linear", [tensor(ROW)], compression_algorithm="gzip")
    np.testing.assert_array_equal(packed.as_numpy("y"), 2 * ROW)


def test_tritons_client_reads_health_metadata_and_configuration(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("nothing")
    assert not client.is_model_ready("linear", "9")
    assert client.get_server_metadata().name == "maas-ray"
    metadata = client.get_model_metadata("mixed")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("mixed", ["1"], "onnxruntime_onnx")
    assert [(item.name, item.datatype, list(item.shape)) for item in metadata.inputs] == [
        ("color", "BYTES", [-1, 1]),
        ("age", "FP32", [-1, 1]),
    ]
    config = client.get_model_config("linear").config
    assert (config.name, config.max_batch_size) == ("linear", 64)
    assert [(item.name, item.data_type, list(item.dims)) for item in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [3])
    ]


def test_statistics_count_grpc_requests(client: triton.InferenceServerClient) -> None:
    def counts() -> tuple[int, int]:
        (found,) = client.get_inference_statistics("lookup").model_stats
        return found.inference_count, found.inference_stats.success.count

    client.infer("lookup", [tensor(np.array([[1], [2]]), "index", "INT64")])
    before = counts()
    client.infer("lookup", [tensor(np.array([[1], [2]]), "index", "INT64")])
    assert counts() == (before[0] + 2, before[1] + 1)
    assert len(client.get_inference_statistics().model_stats) >= 4


def test_the_index_lists_every_model(client: triton.InferenceServerClient) -> None:
    models = client.get_model_repository_index().models
    assert {(model.name, model.version, model.state) for model in models} == {
        (name, "1", "READY") for name in ("linear", "mixed", "lookup", "wide")
    }


def test_the_names_that_serve_is_given_are_those_of_the_service(server: Server) -> None:
    assert set(UNARY) == {"ModelInfer", *CONTROL_METHODS, *RPCS}
    assert all(hasattr(GrpcMethods, name) for name in (*UNARY, STREAM))


def test_loading_reports_why_it_is_not_available(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("linear", config="{}", files={"file:1/model.onnx": b"x"})
    assert caught.value.status() == "StatusCode.INTERNAL"  # as Triton answers it
    assert "failed to load 'linear', failed to poll from model repository" in caught.value.message()


def test_a_tensor_beyond_grpcs_default_limit_passes_and_one_beyond_the_pools_is_refused(
    client: triton.InferenceServerClient,
) -> None:
    array = np.full((4, 1 << 20), 0.5, np.float32)
    answer = client.infer("wide", [tensor(array)])
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * array)
    with pytest.raises(InferenceServerException, match="the limit is 20971520") as caught:
        client.infer("wide", [tensor(np.zeros((6, 1 << 20), np.float32))])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


FAILURES: list[tuple[str, dict[str, Any], str]] = [
    ("NOT_FOUND", {"model_name": "nothing"}, "Request for unknown model: 'nothing' is not found"),
    ("NOT_FOUND", {"model_version": "9"}, "'linear' version 9 is not found"),
    ("INVALID_ARGUMENT", {"model_version": "latest"}, "not a positive integer"),
    ("INVALID_ARGUMENT", {"inputs": [tensor(np.zeros((1, 4), np.float32))]}, "shape [1, 4] does not match"),
    ("UNIMPLEMENTED", {"sequence_id": 5}, "sequences are not supported"),
]


@pytest.mark.parametrize(("code", "change", "reason"), FAILURES, ids=[reason for _, _, reason in FAILURES])
def test_a_refusal_has_its_exact_status_and_its_reason(
    client: triton.InferenceServerClient, code: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**{"model_name": "linear", "inputs": [tensor(ROW)], **change})
    assert caught.value.status() == f"StatusCode.{code}"
    assert reason in caught.value.message()


def test_a_request_that_is_late_on_arrival_is_not_run(server: Server) -> None:
    request = changed()
    request.model_name = "linear"

    async def ask(deadline: float) -> Any:
        service = Service(server.handler, server.manager.spec.limits)
        return await service.answer("ModelInfer", request.SerializeToString(), Caller(b"id", deadline))

    assert server.call(ask(math.inf)).body
    with pytest.raises(DeadlineExceeded):
        server.call(ask(0.0))


@pytest.mark.parametrize("is_stream", [False, True])
def test_answered_requests_leave_no_cycles_for_the_garbage_collector(server: Server, is_stream: bool) -> None:
    request = changed()
    request.model_name = "linear"
    body, num_requests = request.SerializeToString(), 200

    async def bodies() -> AsyncIterator[bytes]:
        for _ in range(num_requests):
            yield body

    async def run(service: Service) -> None:
        caller = Caller(b"id", math.inf)
        if is_stream:
            assert len([answer async for answer in service.stream(bodies(), caller)]) == num_requests
        else:
            for _ in range(num_requests):
                assert (await service.answer("ModelInfer", body, caller)).body

    async def found() -> int:
        service = Service(server.handler, server.manager.spec.limits)
        gc.collect()
        gc.disable()
        try:
            await run(service)
            return sum(type(each) is Pending for each in gc.get_objects())
        finally:
            gc.enable()

    assert server.call(found()) <= 1


def test_a_failure_of_the_model_is_an_error_of_that_request_alone(client: triton.InferenceServerClient) -> None:
    good, poison = tensor(np.array([[1]]), "index", "INT64"), tensor(np.array([[99]]), "index", "INT64")

    def ask(kind: triton.InferInput) -> Any:
        try:
            return client.infer("lookup", [kind]).as_numpy("y").tolist()
        except InferenceServerException as error:
            return error.status()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [good, poison] * 8))
    assert answers[::2] == [[[10.0]]] * 8
    assert len(set(answers[1::2])) == 1
    assert answers[1] != "StatusCode.UNKNOWN"


def call(channel: grpc.Channel, method: str, body: bytes = b"", **more: Any) -> tuple[bytes, Any]:
    response, rpc = channel.unary_unary(f"/{SERVICE}/{method}").with_call(body, timeout=20, **more)
    return response, rpc


def test_answers_carry_request_id_run_and_version(channel: grpc.Channel) -> None:
    request = message("FP32", ROW, is_raw=False, parameters={"binary_data_output": Value(bool_param=False)})
    request.model_name = "linear"
    response, rpc = call(channel, "ModelInfer", request.SerializeToString(), metadata=[("x-request-id", "mine")])
    assert list(pb.ModelInferResponse.FromString(response).outputs[0].contents.fp32_contents) == [2, 4, 6]
    metadata = dict(rpc.trailing_metadata())
    assert metadata == metadata | {"x-request-id": "mine", "x-maas-run": "run-a", "x-maas-version": "1"}


@pytest.mark.parametrize("method", [name for name in UNARY if name not in RPCS])
def test_bytes_without_a_message_are_an_invalid_argument_of_every_method(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, b"\x0a\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"are not a {method}Request" in caught.value.details()


@pytest.mark.parametrize(
    "method", ["SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings", "Nonsense"]
)
def test_methods_that_are_not_offered_are_unimplemented(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_call_to_another_pool_is_refused_with_the_pools_name(channel: grpc.Channel) -> None:
    call(channel, "ServerLive", metadata=[("application", "pool")])
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "ServerLive", metadata=[("application", "other")])
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def stall(server: Server, seconds: float) -> Any:
    """Keeps the loop of the server busy, so that requests arrive together and deadlines pass."""

    async def sleep() -> None:
        time.sleep(seconds)

    return asyncio.run_coroutine_threadsafe(sleep(), server.loop)


def test_a_stream_is_answered_in_order_with_errors_among_the_answers(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    num_requests = 3 * MAX_PIPELINED
    for index in range(num_requests):
        row = tensor(np.full((1, 4 if index % 10 == 3 else 3), index, np.float32))
        client.async_stream_infer("linear", [row], request_id=str(index), enable_empty_final_response=index % 2 == 0)
    for index in range(num_requests):
        result, error = answers.get(timeout=20)
        if index % 10 == 3:
            assert "does not match" in error.message()
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(index)
        assert response.parameters["triton_final_response"].bool_param == (index % 2 == 0)
        np.testing.assert_array_equal(result.as_numpy("y"), np.full((1, 3), 2 * index, np.float32))
    client.stop_stream()


def test_a_stream_with_statuses_ends_with_the_first_error(channel: grpc.Channel) -> None:
    good = changed()
    good.model_name = "linear"
    bodies = [good.SerializeToString(), b"\x0a\xff", good.SerializeToString()]
    stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
        iter(bodies), metadata=[("triton_grpc_error", "true")], timeout=20
    )
    assert pb.ModelStreamInferResponse.FromString(next(stream)).infer_response.model_name == "linear"
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def settled(server: Server) -> int:
    """Requests still in progress, once the loop has had time to notice disconnects."""
    for _ in range(200):
        if server.handler.num_ongoing == 0:
            break
        await asyncio.sleep(0.02)
    return server.handler.num_ongoing


def test_disconnects_and_expired_deadlines_leave_nothing_behind(server: Server, channel: grpc.Channel) -> None:
    request = changed()
    request.model_name = "linear"
    body = request.SerializeToString()
    busy = stall(server, 0.4)
    infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    left = [infer.future(body, timeout=20) for _ in range(20)]
    late = [infer.future(body, timeout=0.1) for _ in range(20)]
    stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([body] * 100), timeout=20)
    for future in left:
        future.cancel()
    stream.cancel()
    for future in late:
        with pytest.raises(grpc.RpcError) as caught:
            future.result()
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    busy.result(20)
    assert server.call(settled(server)) == 0
    call(channel, "ModelInfer", body)
