"""Many callers of one bundle at once, through engine, runner and batcher, without a socket: who gets which answer."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.format import Bundle
from maas_ray.errors import MaasError
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.item import Item, Tensors
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.batching.spec import BatchSpec

SPEC = EngineSpec(warmup_rows=(1,), warmup_runs=1)


@dataclass
class Counted:
    """What the batcher has run."""

    runs: list[int] = field(default_factory=list)
    """Requests of each run."""
    checks: list[str] = field(default_factory=list)
    """What each check of a merged request has found."""
    problem: str = ""

    def waited(self, items: Sequence[Item], now_s: float) -> None:
        pass

    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        self.runs.append(num_requests)

    def checked(self, difference: str) -> None:
        self.checks.append(difference)


Answers = list[Tensors | MaasError | None]


def ask_together(
    engine: Engine, requests: Sequence[Mapping[str, Array]], *, num_rounds: int = 1, **spec: float
) -> tuple[Answers, Counted]:
    """All requests arrive in the same turn of the loop; `num_rounds` times, each after the answers to the one before.

    Returns:
        The answers of all rounds, and what was run.
    """

    async def main() -> tuple[Answers, Counted]:
        loop, counted, answers = asyncio.get_running_loop(), Counted(), Answers()
        runner = EngineRunner(engine, loop)
        batcher = Batcher(
            runner,
            BatchSpec.model_validate({"max_queued_requests": len(requests) + 1, "check_share": 0.0, **spec}),
            loop,
            can_merge=engine.can_merge,
            padding=engine.padding,
            stats=counted,
        )
        for _ in range(num_rounds):
            answers += await _round(batcher, engine.signature.is_batched, requests)
            while batcher.busy_s:
                await asyncio.sleep(0.001)
            for _ in range(5):  # a check begins when the loop finds the engine idle
                await asyncio.sleep(0)
        counted.problem = batcher.problem
        batcher.close()
        runner.close()
        return answers, counted

    return asyncio.run(main())


async def _round(batcher: Batcher, is_batched: bool, requests: Sequence[Mapping[str, Array]]) -> Answers:
    loop = asyncio.get_running_loop()
    answers: Answers = [None] * len(requests)
    over, left = loop.create_future(), len(requests)

    def answer(place: int, outputs: Tensors | None, error: MaasError | None) -> None:
        nonlocal left
        answers[place] = error if outputs is None else outputs
        left -= 1
        if not left:
            over.set_result(None)

    for place, inputs in enumerate(requests):
        num_rows = len(next(iter(inputs.values()))) if is_batched else 1
        batcher.submit(inputs, num_rows, 1, loop.time() + 60, lambda *outcome, place=place: answer(place, *outcome))
    await asyncio.wait_for(over, 60)
    return answers


def load(bundle: Bundle) -> Engine:
    """An engine with a short warm-up."""
    return Engine(bundle, SPEC)
