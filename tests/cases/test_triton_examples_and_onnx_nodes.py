"""Calls of Triton's client examples to the models of its quick start; and ONNX's node tests, served.

The examples themselves are not in any package, so their calls are repeated here, except those of shared memory,
sequences and custom back ends.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import onnx
import pytest
import requests
import uvloop
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from maas_ray.registry.importing import import_onnx
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.request.handler import Handler
from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, publish, serve_app
from tests.support.node_tests import run_all
from tests.support.triton_models import LABELS, MODELS

A = np.arange(16, dtype=np.int32)[None]
B = np.ones((1, 16), np.int32)


class Servers(NamedTuple):
    http: str
    grpc: str


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Both protocols before one model manager."""
    path: Path = tmp_path_factory.mktemp("triton")
    store = open_store(f"file://{path}/store")
    for name, make in MODELS.items():
        onnx.save(make(), path / "model.onnx")
        publish(store, name, import_onnx(store, path / "model.onnx", labels=LABELS.get(name)).bundle_id)
    spec = app_spec(store, *MODELS, model_control="explicit", server_name="triton")
    for server in serve_app(store, spec, "protocol"):
        handler = Handler(server.manager)

        async def start(handler: Handler = handler) -> tuple[Any, int]:
            running = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
            running.add_generic_rpc_handlers(tuple(Rpcs(Service(handler, spec.limits)).services().values()))
            port = running.add_insecure_port("127.0.0.1:0")
            await running.start()
            return running, port

        running, port = server.call(start())
        yield Servers(f"127.0.0.1:{server.port}", f"127.0.0.1:{port}")
        server.call(running.stop(0))


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Any]:
    """The client's module of a protocol, and a client."""
    module: Any = {"http": triton_http, "grpc": triton_grpc}[request.param]
    with module.InferenceServerClient(getattr(servers, request.param)) as client:
        yield module, client


def plain(answer: Any) -> Any:
    """Returns a response of either protocol as JSON values."""
    return answer if isinstance(answer, (dict, list)) else json.loads(_json(answer))


def _json(message: Any) -> str:
    from google.protobuf.json_format import MessageToJson

    return str(MessageToJson(message, preserving_proto_field_name=True))


def inputs(module: Any, name: str, datatype: str, *arrays: Any) -> list[Any]:
    made = []
    for number, array in enumerate(arrays):
        made.append(module.InferInput(name.format(number), list(array.shape), datatype).set_data_from_numpy(array))
    return made


def test_simple_infer(triton: Any) -> None:
    module, client = triton
    outputs = [module.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
    for wanted in (outputs, None):
        answer = client.infer("simple", inputs(module, "INPUT{}", "INT32", A, B), outputs=wanted, headers={"test": "1"})
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), A + B)
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), A - B)
    statistics = plain(client.get_inference_statistics(model_name="simple"))["model_stats"]
    assert [entry["name"] for entry in statistics] == ["simple"]
    with pytest.raises(InferenceServerException, match="Request for unknown model"):
        client.get_inference_statistics(model_name="wrong_model_name")


def test_string_infer(triton: Any) -> None:
    module, client = triton
    texts = [np.array([[str(x).encode() for x in row] for row in array], dtype=np.object_) for array in (A, B)]
    answer = client.infer("simple_string", inputs(module, "INPUT{}", "BYTES", *texts))
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0").astype(np.int32), A + B)
    odd = np.array([[b"\x00\xff", b"", "é".encode()]], dtype=np.object_)  # nulls and bytes of any kind
    answer = client.infer("simple_identity", inputs(module, "INPUT{}", "BYTES", odd))
    assert answer.as_numpy("OUTPUT0").tolist() == odd.tolist()


def test_health_metadata_and_configuration(triton: Any) -> None:
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert plain(client.get_server_metadata())["name"] == "triton"
    assert plain(client.get_model_metadata("simple"))["name"] == "simple"
    config = plain(client.get_model_config("inception_graphdef"))
    config = config.get("config", config)
    assert config["input"][0]["format"] == "FORMAT_NHWC"
    assert int(config["max_batch_size"]) > 1


def test_model_control(triton: Any) -> None:
    _, client = triton
    index = plain(client.get_model_repository_index())
    assert len(index["models"] if isinstance(index, dict) else index) == len(MODELS)
    client.load_model("simple")
    assert client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("simple", config='"parameters": {"config": {{"max_batch_size": "16"}}}')
    client.load_model("simple", config='{"max_batch_size":"16"}')
    config = plain(client.get_model_config("simple"))
    assert config.get("config", config)["max_batch_size"] == 16
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("wrong_model_name")
    client.load_model("simple")


@pytest.mark.parametrize("num_images", [1, 4])
def test_images_are_classified(triton: Any, num_images: int) -> None:
    module, client = triton
    images = np.random.default_rng(0).random((num_images, 299, 299, 3), np.float32)
    output = "InceptionV3/Predictions/Softmax"
    wanted = [module.InferRequestedOutput(output, class_count=3)]
    answer = client.infer("inception_graphdef", inputs(module, "input", "FP32", images), outputs=wanted)
    found = answer.as_numpy(output)
    assert found.shape == (num_images, 3)
    assert [text.split(b":")[2] for text in found[0]] == [b"class 1000", b"class 999", b"class 998"]


def test_encoded_images_are_strings_of_any_bytes(triton: Any) -> None:
    module, client = triton
    images = np.array([[b"\xff\xd8\xff\xe0 a picture"]], dtype=np.object_)
    wanted = [module.InferRequestedOutput("OUTPUT", class_count=1)]
    answer = client.infer("preprocess_inception_ensemble", inputs(module, "INPUT", "BYTES", images), outputs=wanted)
    assert answer.as_numpy("OUTPUT").shape == (1, 1)


@pytest.mark.parametrize(
    ("model", "datatype", "field"),
    [
        ("simple", "INT32", "int_contents"),
        ("simple_int8", "INT8", "int_contents"),
        ("simple_string", "BYTES", "bytes_contents"),
    ],
)
def test_explicit_contents_are_answered_raw(servers: Servers, model: str, datatype: str, field: str) -> None:
    request = service_pb2.ModelInferRequest(model_name=model, id="my request id")
    for name, array in (("INPUT0", A), ("INPUT1", B)):
        values = array.ravel().tolist()
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, 16])
        getattr(tensor.contents, field).extend([str(x).encode() for x in values] if datatype == "BYTES" else values)
    with grpc.insecure_channel(servers.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
    assert len(answer.raw_output_contents) == 2
    if datatype == "INT32":
        assert np.frombuffer(answer.raw_output_contents[0], np.int32).tolist() == (A + B).ravel().tolist()


def test_a_raw_request_of_a_model_without_a_batch(servers: Servers) -> None:
    request = service_pb2.ModelInferRequest(model_name="densenet_onnx", raw_input_contents=[b"a" * 602112])
    request.inputs.add(name="data_0", datatype="FP32", shape=[3, 224, 224])
    request.outputs.add(name="fc6_1")
    with grpc.insecure_channel(servers.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
    assert (list(answer.outputs[0].shape), len(answer.raw_output_contents[0])) == ([1000], 4000)


def test_the_asynchronous_clients(servers: Servers) -> None:
    async def scene() -> list[Any]:
        from tritonclient.grpc import aio as grpc_aio
        from tritonclient.http import aio as http_aio

        found = []
        for module, base, address in ((grpc_aio, triton_grpc, servers.grpc), (http_aio, triton_http, servers.http)):
            async with module.InferenceServerClient(address) as client:
                answer = await client.infer("simple", inputs(base, "INPUT{}", "INT32", A, B))
                found.append(answer.as_numpy("OUTPUT0"))
        return found

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for found in runner.run(scene()):
            np.testing.assert_array_equal(found, A + B)


def test_streams_and_callbacks(servers: Servers) -> None:
    done = threading.Event()
    found: list[Any] = []

    def take(result: Any, error: Any) -> None:
        found.append(error or result.as_numpy("OUTPUT0"))
        if len(found) == 4:
            done.set()

    with triton_grpc.InferenceServerClient(servers.grpc) as client:
        client.start_stream(take)
        for _ in range(2):
            client.async_stream_infer("simple", inputs(triton_grpc, "INPUT{}", "INT32", A, B))
        client.stop_stream()
        for _ in range(2):
            client.async_infer("simple", inputs(triton_grpc, "INPUT{}", "INT32", A, B), callback=take)
        assert done.wait(20)
    assert all(np.array_equal(array, A + B) for array in found)


def test_json_alone(servers: Servers) -> None:
    entries = [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": array.tolist()}
        for name, array in (("INPUT0", A), ("INPUT1", B))
    ]
    answer = requests.post(f"http://{servers.http}/v2/models/simple/infer", json={"inputs": entries}, timeout=20).json()
    assert answer["outputs"][1]["data"] == (A - B).ravel().tolist()


def check_nodes(results: list[dict[str, Any]]) -> None:
    """Whatever plain onnxruntime computes correctly is correct here, or refused with a true reason."""
    ours = {result["name"]: result["ours"] for result in results if result["plain"] == "passed"}
    wrong = {name: text for name, text in ours.items() if not text.startswith(("passed", *TRUE_REASONS))}
    assert wrong == {}
    print(Counter(text.split("'")[0] for text in ours.values()))  # noqa: T201


TRUE_REASONS = ("refused: BundleError: ",)


@pytest.mark.timeout(300)
def test_a_sample_of_onnxs_node_tests(tmp_path: Path) -> None:
    check_nodes(run_all(tmp_path / "out", 7, 150))


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_all_of_onnxs_node_tests(tmp_path: Path) -> None:
    check_nodes(run_all(tmp_path / "out"))
