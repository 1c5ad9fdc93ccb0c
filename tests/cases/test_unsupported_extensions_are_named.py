"""Shared memory, trace and logging got 404, a load refused every configuration, and the error of unknown models had
other words."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from maas_ray.errors import BadRequest, FilesRefused, NotOffered
from maas_ray.serve.wire.load_parameters import read_load
from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import resident


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('extensions')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    spec = app_spec(store, "linear", model_control="explicit", server_name="triton")
    yield from serve_app(store, spec, "protocol")


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "v2/systemsharedmemory/region/a/register"),
        ("POST", "v2/cudasharedmemory/region/a/register"),
        ("GET", "v2/trace/setting"),
        ("POST", "v2/trace/setting"),
        ("GET", "v2/models/linear/trace/setting"),
        ("GET", "v2/logging"),
        ("POST", "v2/logging"),
    ],
)
def test_an_unsupported_extension_is_refused_with_the_alternative(server: Server, method: str, path: str) -> None:
    answer = requests.request(method, f"{server.url}/{path}", json={}, timeout=20)
    assert answer.status_code == 501
    assert "not supported: " in answer.json()["error"]


def test_shared_memory_has_no_regions_to_list_or_to_remove(client: triton.InferenceServerClient) -> None:
    assert client.get_system_shared_memory_status() == []
    assert client.get_cuda_shared_memory_status() == []
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory("mine")
    with pytest.raises(InferenceServerException, match="shared memory is not supported"):
        client.register_system_shared_memory("a", "/a", 64)


def test_sequences_are_not_offered(client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("x", [1, 3], "FP32").set_data_from_numpy(np.ones((1, 3), np.float32))
    with pytest.raises(InferenceServerException, match="sequences are not supported"):
        client.infer("linear", [tensor], sequence_id=5, sequence_start=True)


def test_unknown_models_are_refused_in_tritons_words(client: triton.InferenceServerClient) -> None:
    for call in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics):
        with pytest.raises(InferenceServerException) as caught:
            call("wrong")
        assert caught.value.message().startswith("Request for unknown model: 'wrong' is not found")


def test_the_server_has_the_name_in_the_spec(client: triton.InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "triton"


def test_a_load_may_change_the_batch_size_until_the_next_one(
    server: Server, client: triton.InferenceServerClient
) -> None:
    client.load_model("linear", config='{"max_batch_size":"3"}')
    assert client.get_model_config("linear")["max_batch_size"] == 3
    sizes: list[int] = []

    async def scene() -> None:
        model = resident(server.manager, "linear")
        batcher, start = model.batcher, model.runner.start
        model.runner.start = lambda inputs, rows, done: (sizes.append(rows), start(inputs, rows, done))[1]  # type: ignore[method-assign]
        answers: list[Any] = []
        until = asyncio.get_running_loop().time() + 20
        for _ in range(7):
            row = {"x": np.ones((1, 3), np.float32)}
            batcher.submit(row, 1, 12, until, lambda *args: answers.append(args))
        while len(answers) < 7:
            await asyncio.sleep(0.001)
        model.runner.start = start  # type: ignore[method-assign]

    server.call(scene())
    assert sizes == [3, 3, 1]
    client.load_model("linear")
    assert client.get_model_config("linear")["max_batch_size"] == 64


def test_a_failed_load_is_reported_in_tritons_words(client: triton.InferenceServerClient) -> None:
    for name, config in (("wrong", None), ("linear", "{"), ("linear", '{"instance_group":[]}')):
        with pytest.raises(InferenceServerException) as caught:
            client.load_model(name, config=config)
        assert caught.value.message().startswith(f"failed to load '{name}', ")


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"file:1/model.onnx": "x"}, FilesRefused),
        ({"config": "{}", "file:" + "A" * 256: None}, FilesRefused),
        ({"config": '{"max_batch_size": 0}'}, BadRequest),
        ({"config": '{"max_batch_size": 1.5}'}, BadRequest),
        ({"config": '{"max_batch_size": "many"}'}, BadRequest),
        ({"config": "[]"}, BadRequest),
        ({"config": {}}, BadRequest),
        ({"config": '{"name":"other"}'}, NotOffered),
        ({"mine": 1}, NotOffered),
        ([], BadRequest),
    ],
)
def test_unsupported_load_parameters_are_refused(parameters: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_load("m", parameters)


def test_a_repeated_setting_of_a_configuration_is_not_an_override() -> None:
    assert read_load("m", {"config": '{"name":"m","backend":"onnxruntime","max_batch_size":8}'}).max_batch_size == 8
    assert read_load("m", {"config": "{}"}).max_batch_size is None
    assert read_load("m", None).max_batch_size is None
