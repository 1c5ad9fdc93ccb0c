"""INT_MIN / -1 raised SIGFPE in onnxruntime; repeated on the next replica, one valid request ended the whole pool.

Required: such a version runs in a separate process. The request is repeated once, alone, and refused with a typed
error; requests that shared its run get correct responses, and everything else continues.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests

from maas_ray.bundle.apart.engine import ApartEngine
from maas_ray.bundle.engine.engine import Engine
from maas_ray.errors import RequestQuarantined
from maas_ray.serve.batching.quarantine import KEEP_S, Quarantine
from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.deadly_models import DIVIDING, SWELLING, dividing, remaining, swelling
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import resident

DEADLY = (-(2**31), -2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('s2')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "dividing", commit_bundle(store, dividing(), DIVIDING))
    publish(store, "swelling", commit_bundle(store, swelling(), SWELLING))
    publish(store, "remaining", commit_bundle(store, remaining(), DIVIDING))
    yield from serve_app(store, app_spec(store, "linear", "dividing", "remaining", "swelling"), "protocol")


def divide(server: Server, *rows: tuple[int, int], model: str = "dividing") -> requests.Response:
    inputs = [
        {"name": name, "shape": [len(rows), 1], "datatype": "INT32", "data": [row[place] for row in rows]}
        for place, name in enumerate("ab")
    ]
    return requests.post(f"{server.url}/v2/models/{model}/infer", json={"inputs": inputs}, timeout=60)


def quotients(answer: requests.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["outputs"][0]["data"]
    return found


def engine_of(server: Server, name: str) -> ApartEngine:
    engine = resident(server.manager, name).engine
    assert isinstance(engine, ApartEngine)
    return engine


def test_only_versions_that_nothing_can_crash_run_inside_the_replica(server: Server) -> None:
    assert isinstance(resident(server.manager, "linear").engine, Engine)
    assert "divides integers" in str(engine_of(server, "dividing").nature.hazards.reasons)
    assert "depends on values" in str(engine_of(server, "swelling").nature.hazards.reasons)


def test_a_request_that_kills_is_repeated_once_and_then_refused_by_name(server: Server) -> None:
    deaths = engine_of(server, "dividing").num_deaths
    answer = divide(server, DEADLY)
    assert answer.status_code == 422
    assert "ended the process of model 'dividing' version 1 twice" in answer.json()["error"]
    assert engine_of(server, "dividing").num_deaths == deaths + 2
    assert quotients(divide(server, (7, 1), (-9, 2))) == [3, -3]
    again = divide(server, DEADLY)
    assert (again.status_code, engine_of(server, "dividing").num_deaths) == (422, deaths + 2), "it was run again"


def test_innocent_requests_of_the_same_run_and_other_models_are_answered_rightly(server: Server) -> None:
    stop = threading.Event()

    def ask_other() -> int:
        count = 0
        body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
        while not stop.is_set():
            answer = requests.post(f"{server.url}/v2/models/linear/infer", json=body, timeout=60)
            assert answer.json()["outputs"][0]["data"] == [2, 4, 6]
            count += 1
        return count

    deaths = engine_of(server, "remaining").num_deaths
    with ThreadPoolExecutor(12) as pool:
        other = pool.submit(ask_other)
        try:
            calls = [
                pool.submit(divide, server, *([DEADLY] if number % 30 == 10 else []), (number, 6), model="remaining")
                for number in range(90)
            ]
            for number, call in enumerate(calls):
                if number % 30 == 10:
                    assert call.result().status_code == 422
                else:
                    assert quotients(call.result()) == [number % 7]
        finally:
            stop.set()
        assert other.result() > 0
    assert engine_of(server, "remaining").num_deaths >= deaths + 6


def test_a_killed_process_loses_no_response(server: Server) -> None:
    engine_of(server, "dividing").abort()
    time.sleep(0.1)
    assert quotients(divide(server, (6, 1))) == [3]


def test_the_process_refuses_memory_for_a_request_and_the_replica_keeps_its_own(
    server: Server,
) -> None:
    def expand(count: int) -> requests.Response:
        inputs = [
            {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]},
            {"name": "shape", "shape": [1], "datatype": "INT64", "data": [count]},
        ]
        return requests.post(f"{server.url}/v2/models/swelling/infer", json={"inputs": inputs}, timeout=60)

    assert expand(2**40).status_code in (400, 422, 500)
    assert expand(2**31).status_code in (400, 422, 500), "8 GiB are more than the limit of its process"
    assert expand(3).json()["outputs"][0]["data"] == [1, 1, 1]


def test_a_quarantine_knows_values_not_names_and_ends() -> None:
    quarantine = Quarantine()
    bad = {"a": np.int32([[1]]), "t": np.array([["x", "yz"]], dtype=object)}
    quarantine.add(bad, 0.0)
    with pytest.raises(RequestQuarantined, match="refused for 600 s"):
        quarantine.check({name: array.copy() for name, array in bad.items()}, 1.0, "model 'm'")
    for other in ({**bad, "a": np.int32([[2]])}, {**bad, "t": np.array([["xy", "z"]], dtype=object)}):
        quarantine.check(other, 1.0, "model 'm'")
        assert quarantine.is_active
    quarantine.check(bad, KEEP_S + 1, "model 'm'")
    assert not quarantine.is_active
