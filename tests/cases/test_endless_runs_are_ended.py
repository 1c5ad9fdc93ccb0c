"""Two requests with a loop count of 2**62 blocked a replica's loop for 147 s.

Required: a run without waiting requests is stopped, at its deadline or when its client disconnects, and frees its slot.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from maas_ray.errors import DeadlineExceeded, RunStopped
from maas_ray.serve.batching.item import Tensors
from maas_ray.store.objects import open_store
from tests.attacks.cases import request
from tests.attacks.raw import Talk
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.heavy_models import LOOPING, looping
from tests.support.onnx_models import commit_bundle, linear
from tests.support.residents import resident
from tests.support.rig import HeldEngine, Rig

INFER = b"/v2/models/looping/infer"
BODY = b'{"inputs": [{"name": "n", "shape": [1], "datatype": "INT64", "data": [%d]}]}'
ENDLESS = BODY % 2**62


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('a6')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "looping", commit_bundle(store, looping(), LOOPING))
    yield from serve_app(store, app_spec(store, "linear", "looping", limits={"timeout_s": 1.0}), "protocol")


def ask(server: Server, body: bytes) -> requests.Response:
    return requests.post(f"{server.url}{INFER.decode()}", data=body, timeout=30)


def wait_until_free(server: Server, within_s: float = 5.0) -> None:
    batcher = resident(server.manager, "looping").batcher
    until = time.monotonic() + within_s
    while server.call_plain(lambda: batcher.busy_s) > 0:
        assert time.monotonic() < until, "the run continues although no request waits for it"
        time.sleep(0.01)


def test_runs_without_an_end_are_answered_at_their_deadline_and_ended(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        endless = [pool.submit(ask, server, ENDLESS) for _ in range(2)]
        while not all(call.done() for call in endless):
            began = time.monotonic()
            assert requests.get(f"{server.url}/v2/health/live", timeout=30).status_code == 200
            assert time.monotonic() - began < 1.0
            time.sleep(0.02)
    assert [call.result().status_code for call in endless] == [504, 504]
    wait_until_free(server)
    assert ask(server, BODY % 3).json()["outputs"][0]["data"] == [3.0]


def test_a_run_whose_caller_has_left_is_ended(server: Server) -> None:
    batcher = resident(server.manager, "looping").batcher
    with Talk(server.port) as talk:
        talk.send([request(target=INFER, body=ENDLESS)])
        until = time.monotonic() + 5
        while server.call_plain(lambda: batcher.busy_s) == 0:
            assert time.monotonic() < until
            time.sleep(0.005)
    began = time.monotonic()
    wait_until_free(server)
    assert time.monotonic() - began < 0.9, "its deadline would have ended it only after a second"


class Stoppable(HeldEngine):
    """Runs that end when they are stopped."""

    num_stopped = 0

    def start(self, inputs: Tensors, num_rows: int, finished: Any) -> Any:
        super().start(inputs, num_rows, finished)
        engine = self

        class Stop:
            def set(self) -> None:
                engine.num_stopped += 1
                engine.current[-1] = lambda: finished(None, RunStopped("ended"))

        return Stop()


def stoppable_rig() -> tuple[Rig, Stoppable]:
    engine = Stoppable(seconds=lambda num_rows: 0.1)
    return Rig(engine=engine), engine


def test_a_run_continues_while_any_request_waits_for_it() -> None:
    rig, engine = stoppable_rig()
    left, stays = rig.send("left", 1), rig.send("stays", 2)
    rig.loop.turn()
    rig.batcher.cancel(left)
    assert engine.num_stopped == 0
    rig.finish_all()
    assert rig.answers == {"stays": [4.0]}
    left, stays = rig.send("left", 1), rig.send("leaves too", 2)
    rig.loop.turn()
    rig.batcher.cancel(left)
    rig.batcher.cancel(stays)
    assert engine.num_stopped == 1


def test_requests_that_are_still_in_time_are_run_again_alone_when_their_run_was_ended() -> None:
    rig, engine = stoppable_rig()
    rig.send("late", 3, timeout_s=60)
    rig.send("soon", 1, timeout_s=2)
    rig.send("later", 2, timeout_s=30)
    rig.loop.turn()
    assert engine.runs == [[1.0, 2.0, 3.0]]
    rig.loop.advance(2.1)  # far beyond the 0.1 s that such a run takes
    assert isinstance(rig.answers["soon"], DeadlineExceeded)
    assert engine.num_stopped == 1
    rig.finish_all()
    assert engine.runs[1:] == [[2.0], [3.0]], "alone, the earliest deadline first"
    assert (rig.answers["later"], rig.answers["late"]) == ([4.0], [6.0])


def test_a_run_of_usual_length_is_not_ended_because_one_of_its_requests_expires() -> None:
    rig, engine = stoppable_rig()
    rig.send("soon", 1, timeout_s=0.15)
    rig.send("later", 2, timeout_s=30)
    rig.loop.turn()
    rig.loop.advance(0.2)
    assert engine.num_stopped == 0
    rig.finish_all()
    assert rig.answers["later"] == [4.0]
