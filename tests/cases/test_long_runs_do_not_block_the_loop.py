"""The rows alone decided whether a run was executed on the loop, so a value or a length could block a whole
replica.

Required: only runs that are known to be short execute on the loop, and a call's own deadline applies to its run.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.engine.forms import MAX_FORMS, FormLatencies
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.serve.batching.inline import RUNS_OFF, InlineRule
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.heavy_models import LOOPING, PAIRWISE, looping, looping_in_a_function, pairwise
from tests.support.onnx_models import commit_bundle, linear, make_bundle

ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


def count(turns: int) -> dict[str, Any]:
    return {"inputs": [{"name": "n", "shape": [1], "datatype": "INT64", "data": [turns]}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('s3')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "looping", commit_bundle(store, looping(), LOOPING))
    yield from serve_app(store, app_spec(store, "linear", "looping"), "protocol")


def ask(server: Server, model: str, body: dict[str, Any], timeout_ms: int | None = None) -> requests.Response:
    headers = {} if timeout_ms is None else {"x-request-timeout-ms": str(timeout_ms)}
    return requests.post(f"{server.url}/v2/models/{model}/infer", json=body, headers=headers, timeout=30)


def test_a_run_whose_length_is_a_value_ends_at_its_deadline_and_delays_no_other(server: Server) -> None:
    for _ in range(10):
        assert ask(server, "looping", count(0)).status_code == 200
    slowest_s = 0.0

    async def long_call() -> tuple[int, float]:
        began = time.monotonic()
        answer = await asyncio.to_thread(ask, server, "looping", count(10**9), 1000)
        return answer.status_code, time.monotonic() - began

    async def neighbors(is_over: Callable[[], bool]) -> None:
        nonlocal slowest_s
        while not is_over():
            for work in (
                lambda: requests.get(f"{server.url}/v2/health/live", timeout=30),
                lambda: ask(server, "linear", ROW),
            ):
                began = time.monotonic()
                assert (await asyncio.to_thread(work)).status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - began)

    async def main() -> tuple[int, float]:
        call = asyncio.create_task(long_call())
        await neighbors(call.done)
        return await call

    status, lasted_s = asyncio.run(main())
    assert status == 504
    assert 0.9 < lasted_s < 4.0, "the deadline of the call holds for its run"
    assert slowest_s < 1.0, "the longest was 17 s"
    assert ask(server, "looping", count(3)).json()["outputs"][0]["data"] == [3.0], "the engine is free again"


def run_twice(engine: Engine, *runs: dict[str, Any]) -> list[bool]:
    """Whether each run executed inline, on the loop."""

    async def main() -> list[bool]:
        runner = EngineRunner(engine, asyncio.get_running_loop(), inline_below_s=1.0)
        at_once = []
        for inputs in runs:
            ended = asyncio.Event()
            runner.start(inputs, 1, lambda *result, ended=ended: ended.set())
            at_once.append(ended.is_set())
            await asyncio.wait_for(ended.wait(), 30)
        runner.close()
        return at_once

    return asyncio.run(main())


@pytest.mark.parametrize("graph", [looping, looping_in_a_function])
def test_a_graph_with_a_loop_never_runs_on_the_loop_however_short_its_runs_were(graph: Callable[[], bytes]) -> None:
    zero = {"n": np.int64([0])}
    assert run_twice(Engine(make_bundle(graph(), LOOPING)), *[zero] * 5) == [False] * 5


def test_a_free_length_runs_on_the_loop_once_that_very_length_was_short() -> None:
    short, long = {"x": np.ones(4, np.float32)}, {"x": np.ones(64, np.float32)}
    assert run_twice(Engine(make_bundle(pairwise(), PAIRWISE)), short, short, long, long, short) == [
        False, True, False, True, True,
    ]  # fmt: skip


def test_rows_that_the_warm_up_has_measured_run_on_the_loop_at_once_and_others_do_not() -> None:
    engine = Engine(make_bundle())  # its warm-up runs 1 and 8 rows
    rule = InlineRule(engine, below_s=1.0)
    assert rule.is_short({"x": np.ones((8, 3), np.float32)}, 8)
    assert not rule.is_short({"x": np.ones((64, 3), np.float32)}, 64)


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class Moody(Engine):
    """Computes or waits for longer on request."""

    work: Callable[[], None] | None = None

    def _run(self, inputs: Any, num_rows: int, stop: StopSignal | None = None) -> Any:
        if self.work is not None and inputs["x"][0, 0] == 9:
            self.work()
        return super()._run(inputs, num_rows, stop)


def num_missing(rule: InlineRule, inputs: dict[str, Any]) -> int:
    """Reports short runs in the thread until one may run on the loop again; returns their number."""
    for count in range(100 * RUNS_OFF):
        if rule.is_short(inputs, 1):
            return count
        rule.note_spent(1e-5)
    raise AssertionError("no number of short runs brings it back")


@pytest.mark.parametrize(
    ("work", "comes_back"),
    [(lambda: busy(0.01), False), (None, True)],
    ids=["by computing", "because the machine was busy"],
)
def test_one_slow_run_on_the_loop_moves_the_version_off_it_unless_the_machine_was_slow(
    work: Callable[[], None] | None, comes_back: bool
) -> None:
    engine = Moody(make_bundle())
    usual, slow = {"x": np.ones((1, 3), np.float32)}, {"x": np.full((1, 3), 9, np.float32)}

    async def main() -> None:
        runner = EngineRunner(engine, asyncio.get_running_loop())
        rule = runner.rule

        async def is_at_once(inputs: dict[str, Any]) -> bool:
            ended = asyncio.Event()
            runner.start(inputs, 1, lambda *_: ended.set())
            was = ended.is_set()
            await asyncio.wait_for(ended.wait(), 30)
            return was

        engine.work = work or (lambda: time.sleep(0.01))
        rule.note(usual, 1, 10e-6)
        assert await is_at_once(slow)
        assert not await is_at_once(usual), "nothing runs on the loop until it is known why"
        for _ in range(1000):
            rule.note(usual, 1, 10e-6)
            if rule.is_off or rule.is_short(usual, 1):
                break
            await asyncio.sleep(0.005)
        assert rule.is_short(usual, 1) == comes_back
        if not comes_back:
            assert not await is_at_once(usual)
            assert RUNS_OFF - 2 <= num_missing(rule, usual) < RUNS_OFF, "one or two of them have run already"
            rule.suspect()
            rule.judge(1.0)
            assert num_missing(rule, usual) == 10 * RUNS_OFF, "the next time it takes ten times as many"
        runner.close()

    asyncio.run(main())


def test_estimates_use_all_sizes_of_a_request() -> None:
    latencies = FormLatencies()
    for length in (100, 200):
        for _ in range(3):
            latencies.record(1, 1e-7 * length**2, ((length,),))
    assert latencies.estimate_s(1, ((200,),)) == pytest.approx(4e-3)
    assert latencies.estimate_s(1, ((150,),)) == pytest.approx(2.25e-3, rel=0.01), "interpolated between measurements"
    assert latencies.estimate_s(1, ((1000,),)) == pytest.approx(0.1, rel=0.01), "along the power that was seen"
    assert latencies.estimate_s(1, ((10,),)) == pytest.approx(1e-3), "a run has a fixed cost"


def test_the_forms_that_callers_choose_are_remembered_up_to_a_bound() -> None:
    latencies = FormLatencies()
    for length in range(2000):
        latencies.record(1, 0.1, ((length,),))
    assert 0 < sum(latencies.has_measured(1, ((length,),)) for length in range(2000)) <= MAX_FORMS
    rule = InlineRule(Engine(make_bundle(pairwise(), PAIRWISE)))
    forms = [{"x": np.ones(length, np.float32)} for length in range(3000)]
    for form in forms:
        rule.note(form, 1, 1e-5)
    assert 0 < sum(rule.is_short(form, 1) for form in forms) <= 1024
