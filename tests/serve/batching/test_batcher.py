"""Batcher: shared runs, isolated failures, limits, deadlines and shutdown."""

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from maas_ray.bundle.engine.engine import Engine
from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.item import Item, Tensors
from maas_ray.serve.batching.protocols import Finished
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget
from tests.support.onnx_models import LOOKUP, lookup, make_bundle
from tests.support.rig import HeldEngine, Rig


def test_a_lone_request_on_an_idle_model_runs_in_the_next_turn_without_a_timer() -> None:
    rig = Rig()
    rig.send("a", 1)
    rig.loop.turn()
    assert rig.engine.runs == [[1.0]], "it ran although the clock never moved"


def test_requests_of_the_same_turn_share_a_run() -> None:
    rig = Rig()
    for number in range(3):
        rig.send(str(number), number)
    rig.finish_all()
    assert rig.engine.runs == [[0.0, 1.0, 2.0]]
    assert rig.answers == {"0": [0.0], "1": [2.0], "2": [4.0]}


def test_while_the_engine_is_busy_requests_gather_into_the_largest_batch() -> None:
    rig = Rig()
    rig.send("first", 1)
    rig.loop.turn()
    for number in range(6):
        rig.send(str(number), number)
        rig.loop.turn()
        rig.loop.advance(1.0)
    assert len(rig.engine.runs) == 1, "no batch is closed while the engine is busy"
    rig.finish_all()
    assert rig.engine.runs[1:] == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0]]


def test_the_engine_has_its_next_run_before_the_answers_of_the_last_are_written() -> None:
    rig = Rig()
    runs_when_answered: list[int] = []
    array = np.zeros((1, 1), np.float32)
    rig.batcher.submit({"x": array}, 1, 4, 130.0, lambda *_: runs_when_answered.append(len(rig.engine.runs)))
    rig.loop.turn()
    rig.send("next", 2)
    rig.loop.turn()
    rig.engine.end_run()
    rig.finish_all()
    assert runs_when_answered == [2]
    assert rig.answers == {"next": [4.0]}


def test_rows_are_split_by_the_parsed_numbers() -> None:
    rig = Rig()
    rig.send("two", 1, 2)
    rig.send("one", 3)
    rig.send("three", 4, 5, 6)
    rig.finish_all()
    assert rig.engine.runs == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "three more rows did not fit"
    assert rig.answers == {"two": [2.0, 4.0], "one": [6.0], "three": [8.0, 10.0, 12.0]}


def test_a_request_larger_than_the_batch_size_runs_alone() -> None:
    rig = Rig()
    rig.send("large", *range(9))
    rig.send("small", 1)
    rig.finish_all()
    assert [len(run) for run in rig.engine.runs] == [9, 1]


def test_rows_of_different_sizes_never_share_a_run() -> None:
    rig = Rig()
    rig.send("narrow", 1)
    rig.send("wide", 2, 3, shape=(2,))
    rig.send("narrow too", 4)
    rig.finish_all()
    assert rig.engine.runs == [[1.0, 4.0], [2.0, 3.0]]
    assert rig.answers == {"narrow": [2.0], "wide": [4.0, 6.0], "narrow too": [8.0]}


def test_no_size_starves_another() -> None:
    rig = Rig(max_batch_size=1)
    for number in range(3):
        rig.send(f"narrow {number}", number)
    rig.send("wide", 8, 9, shape=(2,))
    for number in range(3, 9):
        rig.loop.advance(1.0)
        rig.send(f"narrow {number}", number)
    rig.finish_all()
    assert rig.engine.runs.index([8.0, 9.0]) == 3, "it arrived fourth, and has the fourth deadline"


def test_without_a_batch_dimension_every_request_runs_singly() -> None:
    rig = Rig(can_merge=False)
    for number in range(3):
        rig.send(str(number), number)
    rig.finish_all()
    assert rig.engine.runs == [[0.0], [1.0], [2.0]]


def test_one_bad_item_fails_alone() -> None:
    rig = Rig(max_batch_size=8)
    for number in range(7):
        rig.send(str(number), number if number != 3 else -1)
    rig.finish_all()
    assert isinstance(rig.answers.pop("3"), BadRequest)
    assert rig.answers == {str(number): [2.0 * number] for number in range(7) if number != 3}
    assert len(rig.engine.runs) <= 1 + 2 * 3, "found by halving, not by running each alone"


def test_expired_work_is_removed_before_it_runs() -> None:
    rig = Rig()
    rig.send("first", 1)
    rig.loop.turn()
    rig.send("late", 2, timeout_s=1.0)
    rig.send("patient", 3, timeout_s=60.0)
    rig.loop.advance(1.5)
    assert isinstance(rig.answers["late"], DeadlineExceeded), "answered at its deadline, not when the engine is free"
    rig.finish_all()
    assert rig.engine.runs == [[1.0], [3.0]]
    assert rig.answers["patient"] == [6.0]


def test_a_run_that_hangs_still_gets_its_callers_an_answer() -> None:
    rig = Rig()
    rig.send("stuck", 1, timeout_s=2.0)
    rig.loop.turn()
    rig.loop.advance(2.5)
    assert isinstance(rig.answers["stuck"], DeadlineExceeded)
    assert rig.batcher.busy_s == pytest.approx(2.5)
    rig.engine.end_run()
    assert rig.batcher.busy_s == 0.0


def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    rig = Rig()
    with pytest.raises(DeadlineExceeded):
        rig.send("a", 1, timeout_s=0.0)


def test_a_cancelled_item_leaves_the_queue_and_is_not_answered() -> None:
    rig = Rig()
    rig.send("first", 1)
    rig.loop.turn()
    gone = rig.send("gone", 2)
    rig.send("stays", 3)
    rig.batcher.cancel(gone)
    rig.batcher.cancel(gone)
    assert rig.batcher.num_queued == 1
    rig.finish_all()
    assert rig.engine.runs == [[1.0], [3.0]]
    assert set(rig.answers) == {"first", "stays"}


def test_an_item_cancelled_while_it_runs_disturbs_no_other() -> None:
    rig = Rig()
    gone = rig.send("gone", 1)
    rig.send("stays", 2)
    rig.loop.turn()
    rig.batcher.cancel(gone)
    rig.finish_all()
    assert rig.answers == {"stays": [4.0]}


def test_the_queue_is_bounded_by_count_and_the_refusal_has_a_retry_time() -> None:
    rig = Rig(max_queued_requests=5)
    rig.send("first", 1)
    rig.loop.turn()
    for number in range(5):
        rig.send(str(number), number)
    with pytest.raises(Overloaded, match="5 requests wait, the limit is 5") as refused:
        rig.send("one too many", 9)
    assert refused.value.retry_after_s == pytest.approx(6.0), "5 rows are 2 runs of 4 at 3 s each"
    rig.finish_all()
    rig.send("later", 9)
    rig.finish_all()
    assert rig.answers["later"] == [18.0]


def test_the_queue_is_bounded_by_bytes_over_all_models_of_a_replica() -> None:
    budget = ByteBudget(100)
    one, two = Rig(budget=budget), Rig(budget=budget)
    for rig in (one, two):
        rig.send("running", 1, num_bytes=30)
        rig.loop.turn()
        rig.send("waiting", 2, num_bytes=40)
    with pytest.raises(Overloaded, match="80 bytes wait, this request has 40, the limit is 100"):
        two.send("too much", 3, num_bytes=40)
    one.finish_all()
    two.send("fits now", 4, num_bytes=40)
    two.finish_all()
    assert budget.used == 0


def test_closing_answers_waiting_items_and_accepts_no_new_ones() -> None:
    rig = Rig()
    closed: list[bool] = []
    rig.send("running", 1)
    rig.loop.turn()
    rig.send("waiting", 2)
    rig.batcher.close(when_idle=lambda: closed.append(True))
    with pytest.raises(Overloaded, match="being unloaded"):
        rig.send("new", 3)
    assert not closed
    rig.finish_all()
    assert closed == [True]
    assert rig.answers == {"running": [2.0], "waiting": [4.0]}


def test_aborting_fails_waiting_items_with_the_given_error() -> None:
    rig = Rig()
    rig.send("running", 1)
    rig.loop.turn()
    rig.send("waiting", 2)
    rig.batcher.abort(Overloaded("stopping"))
    assert {name: type(answer) for name, answer in rig.answers.items()} == {
        "running": Overloaded,
        "waiting": Overloaded,
    }
    rig.finish_all()
    assert len(rig.engine.runs) == 1


def test_a_model_that_mixes_its_rows_is_run_singly_from_then_on() -> None:
    class Summing(HeldEngine):
        def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> None:
            self.runs.append(inputs["x"].ravel().tolist())
            self.current.append(lambda: finished({"y": inputs["x"].sum(keepdims=True)}, None))

    rig = Rig(engine=Summing())
    for number in (1, 2, 3):
        rig.send(str(number), number)
    rig.finish_all()
    assert rig.answers == {"1": [1.0], "2": [2.0], "3": [3.0]}


def test_a_callback_that_raises_takes_no_other_answer_with_it(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()

    def broken(outputs: Tensors | None, error: MaasError | None) -> None:
        raise RuntimeError("a broken caller")

    rig.batcher.submit({"x": np.ones((1, 1), np.float32)}, 1, 1, rig.loop.now + 9, broken)
    rig.send("fine", 2)
    rig.finish_all()
    assert rig.answers == {"fine": [4.0]}
    assert "could not be delivered" in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_item_ends_once_with_its_own_rows(seed: int) -> None:
    """Random arrivals, sizes, poison, cancels, deadlines and run ends against the simplest model: y is 2x."""
    dice = random.Random(seed)
    budget = ByteBudget(10_000)
    rig = Rig(max_batch_size=dice.choice([1, 3, 8]), max_queued_requests=12, budget=budget)
    sent: dict[str, tuple[float, ...]] = {}
    cancelled: set[str] = set()
    items: dict[str, Item] = {}
    for step in range(400):
        match dice.randrange(6):
            case 0 | 1 | 2:
                width = dice.choice([1, 1, 2])
                values = tuple(float(step * 10 + k) for k in range(width * dice.choice([1, 1, 2, 5])))
                values = tuple(-1.0 for _ in values) if dice.random() < 0.1 else values
                try:
                    items[str(step)] = rig.send(str(step), *values, timeout_s=dice.choice([2.0, 50.0]), shape=(width,))
                    sent[str(step)] = values
                except Overloaded:
                    assert rig.batcher.num_queued == 12
            case 3:
                if rig.engine.is_busy:
                    rig.engine.end_run()
            case 4:
                rig.loop.advance(dice.random())
            case 5:
                if items and dice.random() < 0.3:
                    name = dice.choice(list(items))
                    if name not in rig.answers:
                        rig.batcher.cancel(items[name])
                        cancelled.add(name)
        rig.loop.turn()
    rig.finish_all()
    assert set(rig.answers) == set(sent) - cancelled
    assert rig.batcher.num_queued == 0
    assert rig.batcher.num_ongoing == 0
    assert budget.used == 0
    for name, answer in rig.answers.items():
        if isinstance(answer, BadRequest):
            assert sent[name][0] < 0
        elif not isinstance(answer, DeadlineExceeded):
            assert answer == [2 * value for value in sent[name]]


@pytest.mark.parametrize("inline_below_s", [0.0, 1.0], ids=["threaded", "inline"])
def test_on_a_real_engine_a_poison_row_fails_alone(inline_below_s: float) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        runner = EngineRunner(Engine(make_bundle(lookup(), LOOKUP)), loop, inline_below_s)
        batcher = Batcher(runner, BatchSpec(max_batch_size=64), loop, can_merge=True)
        futures = []
        for number in range(200):
            future = loop.create_future()
            index = np.array([[99 if number % 50 == 7 else number % 5]], np.int64)

            def done(outputs: Tensors | None, error: MaasError | None, future: Any = future) -> None:
                future.set_result(error if outputs is None else float(outputs["y"][0, 0]))

            batcher.submit({"index": index}, 1, 8, loop.time() + 30, done)
            futures.append(future)
        answers = await asyncio.wait_for(asyncio.gather(*futures), 30)
        runner.close()
        return answers

    for number, answer in enumerate(asyncio.run(main())):
        if number % 50 == 7:
            assert isinstance(answer, BadRequest)
        else:
            assert answer == 10.0 * (number % 5)


def test_a_busy_machine_does_not_send_short_runs_through_the_thread() -> None:
    """In a thread a run also waits for the interpreter's lock: by its mean a short run would stay there for good."""

    async def main() -> list[bool]:
        engine = Engine(make_bundle(lookup(), LOOKUP))
        runner = EngineRunner(engine, asyncio.get_running_loop(), inline_below_s=0.05)
        at_once: list[bool] = []
        for _ in range(3):
            answers: list[object] = []
            runner.start({"index": np.zeros((1, 1), np.int64)}, 1, lambda *answer: answers.append(answer))
            at_once.append(bool(answers))
            for _ in range(100):
                engine.latency.record(1, 1.0)
        assert engine.latency.estimate_s(1) > 0.05
        runner.close()
        return at_once

    assert asyncio.run(main()) == [True, True, True]
