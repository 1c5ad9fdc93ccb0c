"""Many callers of one bundle at once, through engine, runner and batcher, without a socket: who gets which answer."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine import Engine, EngineSpec
from maas_ray.bundle.format import Bundle
from maas_ray.errors import MaasError
from maas_ray.serve.batcher import Batcher
from maas_ray.serve.batching import BatchSpec
from maas_ray.serve.item import Item, Tensors
from maas_ray.serve.runner import EngineRunner

SPEC = EngineSpec(warmup_rows=(1,), warmup_runs=1)


@dataclass
class Counted:
    """What the batcher has run."""

    runs: list[int] = field(default_factory=list)
    """Requests of each run."""

    def waited(self, items: Sequence[Item], now_s: float) -> None:
        pass

    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        self.runs.append(num_requests)


def ask_together(
    engine: Engine, requests: Sequence[Mapping[str, Array]], *, max_batch_size: int = 64
) -> tuple[list[Tensors | MaasError | None], Counted]:
    """All requests arrive in the same turn of the loop.

    Returns:
        The answer to each, and what was run.
    """

    async def main() -> tuple[list[Tensors | MaasError | None], Counted]:
        loop, counted = asyncio.get_running_loop(), Counted()
        answers: list[Tensors | MaasError | None] = [None] * len(requests)
        left, over = len(requests), loop.create_future()
        batcher = Batcher(
            EngineRunner(engine, loop),
            BatchSpec(max_batch_size=max_batch_size, max_queued_requests=len(requests) + 1),
            loop,
            can_merge=engine.can_merge,
            stats=counted,
        )

        def answer(place: int, outputs: Tensors | None, error: MaasError | None) -> None:
            nonlocal left
            answers[place] = error if outputs is None else outputs
            left -= 1
            if not left:
                over.set_result(None)

        for place, inputs in enumerate(requests):
            num_rows = len(next(iter(inputs.values()))) if engine.signature.is_batched else 1
            batcher.submit(inputs, num_rows, 1, loop.time() + 60, lambda *outcome, place=place: answer(place, *outcome))
        await asyncio.wait_for(over, 60)
        batcher.close()
        return answers, counted

    return asyncio.run(main())


def load(bundle: Bundle) -> Engine:
    """An engine with a short warm-up."""
    return Engine(bundle, SPEC)
