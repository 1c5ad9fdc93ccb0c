"""gRPC through a cluster's front in both profiles: Triton's own client, two pools, two replicas; the same answers."""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yaml
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.store.objects import open_store
from tests.conftest import unused_port
from tests.serve.conftest import publish
from tests.support.onnx_models import commit_bundle, linear

pytestmark = pytest.mark.fault

ROW = np.array([[1, 2, 3]], np.float32)
A, B = {"application": "a"}, {"application": "b"}
IN_TWO = (
    "StatusCode.INVALID_ARGUMENT model 'linear' may be in several pools; send the name of the pool as the metadata "
    "'application'"
)


@dataclass
class Front:
    """A cluster of its own with pool `a` (model linear, two replicas) and pool `b` (models come and go)."""

    address: str
    inner_ports: set[int]
    """Ports of gRPC behind the front, and its own."""
    num_listening: int
    """How many of them are used."""


@pytest.fixture(scope="module", params=["fast", "portable"])
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    home = tmp_path_factory.mktemp("home")
    store = open_store(f"file://{home}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0), run="run-a"))
    publish(store, "wide", commit_bundle(store, linear(2.0, width=1 << 20), wide_signature(), run="run-b"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["MAAS_RAY_HOME"] = str(home / "state")

    def run(*arguments: str) -> Any:
        command = [sys.executable, "-m", "maas_ray.cli", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in arguments else None

    run("up", "--profile", request.param, "--num-cpus", "6", "--port", "0", "--dashboard-port", "0")
    try:
        (state,) = (home / "state").glob("cluster.json")
        cluster = json.loads(state.read_text())
        port = unused_port()
        spec = {
            "profile": request.param,
            "storage": {"uri": store.uri},
            "http": {"port": cluster["http_port"]},
            "grpc": {"port": port},
            "pools": [
                {"name": "a", "route_prefix": "/a", "replicas": 2, "models": [{"name": "linear"}]},
                {"name": "b", "route_prefix": "/b", "models": [{"name": "*"}], "model_control": "explicit"},
            ],
        }
        (home / "spec.yaml").write_text(yaml.safe_dump(spec))
        run("serve", str(home / "spec.yaml"))
        variables = cluster["environment"]
        inner = {port}
        if request.param == "fast":
            first = int(variables["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"])
            inner |= {*range(first, first + 100), int(variables["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"])}
        # HAProxy, the proxy behind it that answers for pools without replicas, three replicas; or one proxy.
        yield Front(f"127.0.0.1:{port}", inner, num_listening=5 if request.param == "fast" else 1)
    finally:
        run("down", "--drain-timeout-s", "0")


def wide_signature() -> Signature:
    x, y = (TensorSpec(name=name, datatype="FP32", shape=(-1, 1 << 20)) for name in ("x", "y"))
    return Signature(inputs=(x,), outputs=(y,))


@pytest.fixture
def client(front: Front) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(front.address) as client:
        yield client


def tensor(array: Any) -> triton.InferInput:
    return triton.InferInput("x", list(array.shape), "FP32").set_data_from_numpy(array)


def test_each_pool_answers_those_who_name_it(client: triton.InferenceServerClient) -> None:
    for _ in range(20):
        answer = client.infer("linear", [tensor(ROW)], headers=A, request_id="7")
        np.testing.assert_array_equal(answer.as_numpy("y"), 2 * ROW)
        assert answer.get_response().id == "7"
    assert client.is_server_ready(headers=A)
    assert client.is_model_ready("linear", headers=A)
    assert list(client.get_model_metadata("linear", headers=A).versions) == ["1"]
    assert client.get_model_config("linear", headers=A).config.max_batch_size > 0
    with pytest.raises(InferenceServerException) as caught:
        client.infer("linear", [tensor(ROW)], headers={"application": "c"})
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_refusals_have_their_exact_status_and_reason(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nothing' is not found") as caught:
        client.infer("nothing", [tensor(ROW)], headers=A)
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="does not match") as caught:
        client.infer("linear", [tensor(ROW[:, :2])], headers=A)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException) as caught:
        client.infer("linear", [tensor(np.zeros((1, 5 << 20), np.float32))], headers=A)
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_a_stream_continues_after_an_error(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=A)
    for index in range(30):
        row = np.full((1, 2 if index == 10 else 3), index, np.float32)
        client.async_stream_infer("linear", [tensor(row)], request_id=str(index))
    for index in range(30):
        result, error = answers.get(timeout=30)
        if index == 10:
            assert "does not match" in error.message()
        else:
            assert error is None, f"{index}: {error}"
            assert result.get_response().id == str(index)
    client.stop_stream()


def test_statistics_and_index_are_those_of_all_replicas(client: triton.InferenceServerClient) -> None:
    def count() -> int:
        (found,) = client.get_inference_statistics("linear", headers=A).model_stats
        return int(found.inference_count)

    before = count()
    for _ in range(40):
        client.infer("linear", [tensor(ROW)], headers=A)
    assert count() == before + 40
    index = client.get_model_repository_index(headers=A).models
    assert [(model.name, model.version, model.state) for model in index] == [("linear", "1", "READY")]


def test_models_are_loaded_and_unloaded_and_large_tensors_pass(client: triton.InferenceServerClient) -> None:
    client.load_model("wide", headers=B)
    assert client.is_model_ready("wide", headers=B)
    array = np.full((3, 1 << 20), 0.5, np.float32)
    np.testing.assert_array_equal(client.infer("wide", [tensor(array)], headers=B).as_numpy("y"), 2 * array)
    client.unload_model("wide", headers=B)
    with pytest.raises(InferenceServerException):
        client.infer("wide", [tensor(array)], headers=B)


def refusal_of(client: triton.InferenceServerClient) -> str:
    """Why no pool answers a call that names none; empty if one does."""
    try:
        client.infer("linear", [tensor(ROW)])
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return ""


def test_a_call_that_names_no_pool_reaches_the_only_one_of_its_model(client: triton.InferenceServerClient) -> None:
    def wait_for(refusal: str) -> None:
        deadline = time.monotonic() + 60
        # What pools serve is looked up every few seconds, by each replica on its own.
        while any((found := refusal_of(client)) != refusal for _ in range(8)):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    wait_for(IN_TWO)  # b serves every model of the registry
    client.unload_model("linear", headers=B)
    wait_for("")
    for index in range(10):
        answer = client.infer("linear", [tensor(ROW)], request_id=str(index), client_timeout=60)
        np.testing.assert_array_equal(answer.as_numpy("y"), 2 * ROW)
        assert answer.get_response().id == str(index)
    client.load_model("wide", client_timeout=60)
    array = np.full((1, 1 << 20), 0.5, np.float32)
    np.testing.assert_array_equal(client.infer("wide", [tensor(array)]).as_numpy("y"), 2 * array)
    assert client.get_model_metadata("wide").name == "wide"
    assert client.is_model_ready("linear")
    assert client.is_model_ready("wide")
    assert client.is_server_live()
    with pytest.raises(InferenceServerException, match="does not match") as caught:
        client.infer("linear", [tensor(ROW[:, :2])])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="application") as caught:
        client.get_model_repository_index()
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    client.load_model("linear", headers=B)
    wait_for(IN_TWO)
    client.unload_model("wide", headers=B)


def test_nothing_of_grpc_listens_on_every_address(front: Front) -> None:
    listed = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True, timeout=20).stdout
    listening = [line.split()[3].rsplit(":", 1) for line in listed.splitlines()]
    found = {int(port): host for host, port in listening if int(port) in front.inner_ports}
    assert len(found) == front.num_listening
    assert set(found.values()) <= {"127.0.0.1", "[::ffff:127.0.0.1]"}
