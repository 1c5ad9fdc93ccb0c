"""A timeout parameter of 1 µs was answered with 200: the loop's clock does not advance while the loop is busy."""

from collections.abc import Iterator

import pytest
import requests

from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, linear


@pytest.fixture(scope="module", params=["protocol", "plain"])
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('timeouts')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    yield from serve_app(store, app_spec(store, "linear"), request.param)


def _infer(server: Server, timeout_us: int | None, session: requests.Session) -> requests.Response:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    body = {"inputs": [tensor], **({} if timeout_us is None else {"parameters": {"timeout": timeout_us}})}
    return session.post(f"{server.url}/v2/models/linear/infer", json=body, timeout=30)


def _num_runs(server: Server, session: requests.Session) -> int:
    stats = session.get(f"{server.url}/v2/models/linear/stats", timeout=30).json()["model_stats"]
    return int(stats[0]["execution_count"])


@pytest.mark.parametrize("timeout_us", [1, 2, 5])
def test_a_request_without_time_is_never_run(server: Server, timeout_us: int) -> None:
    with requests.Session() as session:
        assert _infer(server, None, session).status_code == 200
        runs = _num_runs(server, session)
        for _ in range(50):
            answer = _infer(server, timeout_us, session)
            assert answer.status_code == 504, answer.text
            assert f"within the {timeout_us} microseconds of the parameter 'timeout'" in answer.json()["error"]
        assert _num_runs(server, session) == runs
        assert _infer(server, None, session).status_code == 200


def test_a_request_with_time_is_answered(server: Server) -> None:
    with requests.Session() as session:
        for timeout_us in (0, 10_000_000, (1 << 63) - 1):
            assert _infer(server, timeout_us, session).status_code == 200
