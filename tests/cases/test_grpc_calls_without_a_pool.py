"""With several pools, a gRPC call without the metadata `application` was refused although one pool serves its
model.

Two pools with real models on real gRPC servers; only the connection between them is not Ray's.
"""

import asyncio
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc

from maas_ray.errors import BadRequest, DeadlineExceeded
from maas_ray.serve.grpc.outcome import CallOutcome
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.grpc.unnamed import Served, Unnamed, model_of
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.handler import Handler
from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, publish
from tests.support.onnx_models import commit_bundle, linear

UNNAMED = (("x-maas-unnamed", "1"),)
CODES = grpc.StatusCode


@dataclass
class Pools:
    """`Neighbors` of pool a in one process."""

    served: dict[str, Served]
    rpcs: dict[str, Rpcs] = field(default_factory=dict)
    calls: list[tuple[str, str, Mapping[str, str], float]] = field(default_factory=list)
    is_silent: bool = False
    num_cancelled: int = 0

    async def pools(self) -> Mapping[str, Served]:
        return self.served

    async def call(
        self, pool: str, method: str, body: bytes, metadata: Mapping[str, str], timeout_s: float
    ) -> CallOutcome:
        self.calls.append((pool, method, metadata, timeout_s))
        if self.is_silent:
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.sleep(60)
            except TimeoutError:
                raise DeadlineExceeded("late") from None
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        return await self.rpcs[pool].carry(method, body, metadata, timeout_s)


@dataclass
class Cluster:
    stub: Any
    pools: Pools


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    store = open_store(f"file://{tmp_path_factory.mktemp('pools')}/store")
    for name, factor in (("here", 2.0), ("there", 3.0), ("both", 5.0)):
        publish(store, name, commit_bundle(store, linear(factor), run=f"run-{name}"))
    specs = {"a": app_spec(store, "here", "both"), "b": app_spec(store, "there", "both")}
    pools = Pools({})
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    loop = runner.get_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def start() -> tuple[Any, int, list[ModelManager]]:
        managers = []
        for name, spec in specs.items():
            manager = ModelManager(store, spec, pool=name)
            await manager.start()
            managers.append(manager)
            handler = Handler(manager)
            # Pool b must not forward the call: another pool has already forwarded it.
            pools.rpcs[name] = Rpcs(Service(handler, spec.limits), name, Unnamed(pools, name))
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(tuple(pools.rpcs["a"].services().values()))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port, managers

    server, port, managers = call(start())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Cluster(service_pb2_grpc.GRPCInferenceServiceStub(channel), pools)
    call(server.stop(0))
    for manager in managers:
        call(manager.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    runner.close()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    pools = running.pools
    pools.calls.clear()
    pools.is_silent, pools.num_cancelled = False, 0
    pools.served.update(a=Served({"here", "both"}, False), b=Served({"there", "both"}, False))
    return running


def request(model: str, num_columns: int = 3) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model, id="7")
    message.inputs.add(name="x", datatype="FP32", shape=[1, num_columns])
    message.raw_input_contents.append(np.arange(num_columns, dtype=np.float32).tobytes())
    return message


def refusal(call: Any, *arguments: Any, **more: Any) -> tuple[Any, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=20, **more)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize(("model", "factor", "asked"), [("here", 2.0, []), ("there", 3.0, ["b"])])
def test_the_only_pool_of_a_model_answers(cluster: Cluster, model: str, factor: float, asked: Collection[str]) -> None:
    call = cluster.stub.ModelInfer.with_call
    answer, done = call(
        request(model), timeout=20, metadata=(*UNNAMED, ("x-request-id", "mine"), ("traceparent", "00-1"))
    )
    np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), factor * np.arange(3))
    assert answer.id == "7"
    assert dict(done.trailing_metadata())["x-request-id"] == "mine"
    assert dict(done.trailing_metadata())["x-maas-run"] == f"run-{model}"
    assert [pool for pool, *_ in cluster.pools.calls] == list(asked)
    for _, _, metadata, timeout_s in cluster.pools.calls:
        assert metadata["application"] == "b"
        assert metadata["traceparent"] == "00-1"
        assert "x-maas-unnamed" not in metadata
        assert 0 < timeout_s <= 21  # gRPC adds a little


@pytest.mark.parametrize("model", ["here", "there"])
def test_questions_about_a_model_reach_its_pool(cluster: Cluster, model: str) -> None:
    stub = cluster.stub
    ready = stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=20, metadata=UNNAMED)
    assert ready.ready
    about = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), timeout=20, metadata=UNNAMED)
    assert about.name == model
    config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=20, metadata=UNNAMED)
    assert config.config.name == model
    counts = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model), timeout=20, metadata=UNNAMED)
    assert [entry.name for entry in counts.model_stats] == [model]


def test_a_refusal_of_the_other_pool_is_returned_unchanged(cluster: Cluster) -> None:
    code, details = refusal(cluster.stub.ModelInfer, request("there", 2), metadata=UNNAMED)
    assert code == CODES.INVALID_ARGUMENT
    assert "does not match" in details


def test_a_model_of_several_pools_asks_for_the_metadata_and_names_no_pool(cluster: Cluster) -> None:
    code, details = refusal(cluster.stub.ModelInfer, request("both"), metadata=UNNAMED)
    assert code == CODES.INVALID_ARGUMENT
    assert "metadata 'application'" in details
    assert "'a'" not in details
    assert "'b'" not in details
    assert not cluster.pools.calls
    answer = cluster.stub.ModelInfer(request("both"), timeout=20, metadata=(("application", "a"),))
    assert answer.model_name == "both"


def test_a_model_of_no_pool_is_unknown(cluster: Cluster) -> None:
    code, details = refusal(cluster.stub.ModelInfer, request("none"), metadata=UNNAMED)
    assert code == CODES.NOT_FOUND
    assert details.startswith("Request for unknown model: 'none' is not found")
    assert "metadata 'application'" in details
    ready = cluster.stub.ModelReady(service_pb2.ModelReadyRequest(name="none"), timeout=20, metadata=UNNAMED)
    assert not ready.ready


@pytest.mark.parametrize("method", ["RepositoryIndex", "ModelStatistics"])
def test_a_question_about_a_whole_pool_must_name_one(cluster: Cluster, method: str) -> None:
    message = getattr(service_pb2, f"{method}Request")()
    code, details = refusal(getattr(cluster.stub, method), message, metadata=UNNAMED)
    assert code == CODES.INVALID_ARGUMENT
    assert "metadata 'application'" in details


def stream(cluster: Cluster, *requests: Any, metadata: Any = UNNAMED) -> list[Any]:
    return list(cluster.stub.ModelStreamInfer(iter(requests), timeout=20, metadata=metadata))


def test_each_request_of_a_stream_goes_to_the_pool_of_its_model(cluster: Cluster) -> None:
    models = ["there", "here", "there", "here"]
    answers = stream(cluster, *map(request, models))
    assert [answer.infer_response.model_name for answer in answers] == models  # in the order of the requests
    assert not any(answer.error_message for answer in answers)
    for model, answer in zip(models, answers, strict=True):
        found = np.frombuffer(answer.infer_response.raw_output_contents[0], np.float32)
        np.testing.assert_array_equal(found, {"here": 2.0, "there": 3.0}[model] * np.arange(3))
    assert [(pool, method) for pool, method, *_ in cluster.pools.calls] == 2 * [("b", "ModelInfer")]


def test_a_stream_continues_after_a_request_for_no_pool_or_several(cluster: Cluster) -> None:
    answers = stream(cluster, request("both"), request("none"), request("there", 2), request("there"))
    assert [bool(answer.error_message) for answer in answers] == [True, True, True, False]
    assert "metadata 'application'" in answers[0].error_message
    assert "unknown model" in answers[1].error_message
    assert "does not match" in answers[2].error_message
    assert [answer.infer_response.id for answer in answers] == ["7"] * 4


def test_a_refusal_of_the_other_pool_ends_a_stream_that_asks_for_a_status(cluster: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stream(cluster, request("there", 2), metadata=(*UNNAMED, ("triton_grpc_error", "true")))
    assert caught.value.code() == CODES.INVALID_ARGUMENT
    assert "does not match" in caught.value.details()


def test_the_last_answer_of_another_pools_request_is_marked_as_final(cluster: Cluster) -> None:
    asking = request("there")
    asking.parameters["triton_enable_empty_final_response"].bool_param = True
    (answer,) = stream(cluster, asking)
    assert answer.infer_response.parameters["triton_final_response"].bool_param


def test_loads_and_new_models_go_to_the_only_pool_that_accepts_loads(cluster: Cluster) -> None:
    cluster.pools.served.update(b=Served({"there", "both"}, True))
    for model in ("late", "there", "both"):
        message = service_pb2.RepositoryModelLoadRequest(model_name=model)
        refusal(cluster.stub.RepositoryModelLoad, message, metadata=UNNAMED)  # b's own spec accepts none here
    refusal(cluster.stub.ModelInfer, request("late"), metadata=UNNAMED)
    assert [(pool, method) for pool, method, *_ in cluster.pools.calls] == [
        *(3 * [("b", "RepositoryModelLoad")]),
        ("b", "ModelInfer"),
    ]
    cluster.pools.served.update(a=Served({"here", "both"}, True))
    code, details = refusal(cluster.stub.ModelInfer, request("late"), metadata=UNNAMED)
    assert code == CODES.INVALID_ARGUMENT
    assert "metadata 'application'" in details


def test_a_call_is_passed_on_once_even_if_the_records_are_wrong(cluster: Cluster) -> None:
    cluster.pools.served.update(a=Served((), False), b=Served({"here"}, False))
    code, details = refusal(cluster.stub.ModelInfer, request("here"), metadata=UNNAMED)
    assert code == CODES.NOT_FOUND
    assert "unknown model" in details
    assert len(cluster.pools.calls) == 1


def test_calls_that_name_their_pool_or_have_no_choice_look_nothing_up(cluster: Cluster) -> None:
    cluster.pools.served.clear()  # a look would not find this pool
    for metadata in ((("application", "a"),), ()):
        assert cluster.stub.ModelInfer(request("both"), timeout=20, metadata=metadata).model_name == "both"
    code, _ = refusal(cluster.stub.ModelInfer, request("there"), metadata=(("application", "b"), *UNNAMED))
    assert code == CODES.NOT_FOUND
    assert not cluster.pools.calls


def test_the_callers_deadline_and_leaving_end_the_call_in_the_other_pool(cluster: Cluster) -> None:
    cluster.pools.is_silent = True
    with pytest.raises(grpc.RpcError) as caught:
        cluster.stub.ModelInfer(request("there"), timeout=0.5, metadata=UNNAMED)
    assert caught.value.code() == CODES.DEADLINE_EXCEEDED
    assert cluster.pools.calls[0][3] <= 2
    leaving = cluster.stub.ModelInfer.future(request("there"), timeout=20, metadata=UNNAMED)
    pause = threading.Event()
    for _ in range(200):
        if len(cluster.pools.calls) == 2:
            break
        pause.wait(0.05)
    before = cluster.pools.num_cancelled
    leaving.cancel()
    for _ in range(200):
        if cluster.pools.num_cancelled > before:
            break
        pause.wait(0.05)
    assert cluster.pools.num_cancelled > before


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"\x0a\x03abc\x12\x011", "abc"),
        (b"\x12\x011\x0a\x03abc", "abc"),
        (b"\x18\x05\x25abcd\x0a\x01m", "m"),
        (b"", ""),
        (b"\x12\x011", ""),
    ],
)
def test_the_name_of_a_model_is_found_without_reading_the_message(body: bytes, name: str) -> None:
    assert model_of("ModelInfer", body) == name


@pytest.mark.parametrize(
    "body", [b"\x0a\x05abc", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0b", b"\x12\x00" * 99 + b"\x0a\x01m"]
)
def test_bytes_without_a_name_near_their_beginning_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        model_of("ModelInfer", body)
