"""Marked rows of four tenants through a real engine: with cancelled, false and poisoned requests, no rows are mixed up.

The checker is independent of the batcher: it compares requests with responses.
"""

import asyncio
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.item import Item, Tensors
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.batching.spec import BatchSpec
from tests.support.onnx_models import MARKING, make_bundle, marking

TENANTS = ("north", "east", "south", "west")


class Asked:
    """One request: its marks are its tenant, its number and the row, so that a foreign one is known by itself."""

    def __init__(self, number: int, dice: random.Random) -> None:
        self.number = number
        self.tenant = dice.randrange(len(TENANTS))
        self.num_rows = dice.choice([1, 1, 1, 2, 3, 7])
        self.width = dice.choice([1, 2, 2, 5])
        self.is_poison = dice.random() < 0.005
        self.lie = dice.choice([-1, 1, 64]) if dice.random() < 0.01 else 0
        self.first_mark = (self.tenant << 48) + (number << 16)

    def inputs(self) -> Tensors:
        marks = self.first_mark + np.arange(self.num_rows, dtype=np.int64)[:, None]
        x = np.repeat((marks % 1009).astype(np.float32), self.width, axis=1)
        index = marks % 5
        if self.is_poison:
            index[-1] = 77
        lying = self.number % 3  # which of the tensors has other rows than the request
        tensors = {"mark": marks, "x": x, "index": index}
        if self.lie:
            name = list(tensors)[lying]
            tensors[name] = np.resize(tensors[name], (max(0, self.num_rows + self.lie), *tensors[name].shape[1:]))
        return tensors


class Checker:
    """Counts the responses, and every row that belongs to another request."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.num_rows = 0
        self.foreign: list[tuple[int, list[int]]] = []

    def answered(self, asked: Asked, outputs: Tensors | None, error: MaasError | None) -> None:
        if outputs is None:
            self.outcomes[type(error).__name__] += 1
            assert not isinstance(error, BadRequest) or asked.is_poison or asked.lie, f"{asked.number} was healthy"
            return
        self.outcomes["ok"] += 1
        self.num_rows += asked.num_rows
        assert not asked.is_poison
        assert not asked.lie
        marks = [asked.first_mark + row for row in range(asked.num_rows)]
        got = outputs["echo"].ravel().tolist()
        right = (
            got == marks
            and outputs["total"].ravel().tolist() == [mark % 1009 * asked.width for mark in marks]
            and outputs["found"].ravel().tolist() == [mark % 5 * 10 for mark in marks]
        )
        if not right:
            self.foreign.append((asked.number, got))


class Swapping(EngineRunner):
    """Exchanges two neighbours' rows once in a hundred runs: the fault that the checker must find."""

    num_runs = 0

    def _run(
        self, inputs: Tensors, num_rows: int, stop: StopSignal | None = None
    ) -> tuple[Tensors | None, MaasError | None, float]:
        outputs, error, seconds = super()._run(inputs, num_rows, stop)
        self.num_runs += 1
        if outputs is not None and self.num_runs % 100 == 0:
            outputs = {name: np.roll(array, 1, axis=0) for name, array in outputs.items()}
        return outputs, error, seconds


def storm(num_rows: int, kind: type[EngineRunner], inline_below_s: float, instances: int, seed: int) -> Checker:
    """Sends until this many rows were answered successfully, in bursts of random size."""
    dice = random.Random(seed)
    checker = Checker()
    engine = Engine(make_bundle(marking(), MARKING), EngineSpec(instances=instances, warmup_rows=(1, 16)))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        runner = kind(engine, loop, inline_below_s)
        spec = BatchSpec(max_batch_size=16, max_queued_requests=200)
        batcher = Batcher(runner, spec, loop, can_merge=True)
        going: dict[Asked, Item] = {}
        number = 0

        def send(asked: Asked) -> None:
            def done(outputs: Tensors | None, error: MaasError | None) -> None:
                going.pop(asked, None)
                checker.answered(asked, outputs, error)

            deadline = loop.time() + (dice.choice([0.002, 0.02]) if dice.random() < 0.05 else 30)
            try:
                going[asked] = batcher.submit(
                    asked.inputs(), asked.num_rows, 64, deadline, done,
                    tenant=TENANTS[asked.tenant], priority=dice.choice([0, 0, 1, 2]),
                )  # fmt: skip
            except MaasError as error:
                checker.answered(asked, None, error)

        while checker.num_rows < num_rows:
            for _ in range(dice.choice([1, 5, 40, 120])):
                asked = Asked(number, dice)
                send(asked)
                number += 1
            for asked in [asked for asked in going if dice.random() < 0.05]:
                if (item := going.pop(asked, None)) is not None:
                    batcher.cancel(item)
                    checker.outcomes["cancelled"] += 1
            for _ in range(dice.choice([1, 3, 30])):
                await asyncio.sleep(0)
        idle = asyncio.Event()
        batcher.close(when_idle=idle.set)
        await asyncio.wait_for(idle.wait(), 60)
        runner.close()
        assert not going
        assert checker.outcomes.total() == number, "each was answered or cancelled, once"

    asyncio.run(main())
    return checker


WAYS: list[Any] = [pytest.param(1.0, 1, id="inline"), pytest.param(0.0, 2, id="two threads")]


@pytest.mark.parametrize(("inline_below_s", "instances"), WAYS)
def test_no_row_reaches_another_request(inline_below_s: float, instances: int) -> None:
    checker = storm(10_000, EngineRunner, inline_below_s, instances, seed=1)
    assert checker.foreign == []
    for kind in ("cancelled", BadRequest.__name__, Overloaded.__name__, DeadlineExceeded.__name__):
        assert checker.outcomes[kind] > 0, f"the storm had no {kind}: {checker.outcomes}"


@pytest.mark.fault
@pytest.mark.parametrize(("inline_below_s", "instances"), WAYS)
@pytest.mark.parametrize("seed", [2, 3])
def test_no_row_of_two_hundred_thousand_reaches_another_request(
    inline_below_s: float, instances: int, seed: int
) -> None:
    checker = storm(200_000, EngineRunner, inline_below_s, instances, seed)
    assert checker.foreign == []


def test_rows_that_are_exchanged_are_found() -> None:
    assert storm(5_000, Swapping, 1.0, 1, seed=4).foreign
