"""A batcher driven by hand: a loop whose clock and callbacks the test moves, and an engine that it holds and frees."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from maas_ray.errors import BadRequest, MaasError
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.item import Item, Tensors
from maas_ray.serve.batching.protocols import Finished
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget


class Waits:
    """A request as statistics see it, which came at time 0."""

    arrived_s = queue_s = 0.0


class Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualLoop:
    """A clock that only the test advances; `turn` runs the due callbacks."""

    def __init__(self) -> None:
        self.now = 100.0
        self._soon: list[Callable[[], object]] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], object], /) -> None:
        self._soon.append(callback)

    def call_at(self, when: float, callback: Callable[[], object], /) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (when, next(self._count), timer))
        return timer

    def turn(self) -> None:
        due, self._soon = self._soon, []
        for callback in due:
            callback()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while self._timers and self._timers[0][0] <= self.now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback()


class HeldEngine:
    """y = 2x, once the test lets the run end; fails for rows that hold a negative number."""

    form_of = None

    def __init__(self, instances: int = 1, seconds: Callable[[int], float] = lambda num_rows: 3.0) -> None:
        self.instances = instances
        self.seconds = seconds
        self.runs: list[list[float]] = []
        self.current: list[Callable[[], None]] = []
        """Ends each current run, the oldest first."""

    def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> None:
        x = inputs["x"]
        assert len(x) == num_rows
        self.runs.append(x.ravel().tolist())
        if (x < 0).any():  # type: ignore[operator]
            self.current.append(lambda: finished(None, BadRequest("negative")))
        else:
            self.current.append(lambda: finished({"y": x * 2}, None))  # type: ignore[operator]

    def estimate_s(self, num_rows: int, form: object = ()) -> float:
        return self.seconds(num_rows)

    @property
    def is_busy(self) -> bool:
        return bool(self.current)

    def end_run(self, which: int = 0) -> None:
        """Ends one of the current runs, by default the oldest."""
        self.current.pop(which)()


class Rig:
    def __init__(
        self,
        can_merge: bool = True,
        budget: ByteBudget | None = None,
        instances: int = 1,
        seconds: Callable[[int], float] = lambda num_rows: 3.0,
        stats: Any = None,
        engine: HeldEngine | None = None,
        **spec: Any,
    ) -> None:
        self.loop = ManualLoop()
        self.engine = engine or HeldEngine(instances, seconds)
        spec = {"max_batch_size": 4, **spec}
        self.batcher = Batcher(
            self.engine, BatchSpec(**spec), self.loop, can_merge=can_merge, budget=budget, stats=stats
        )
        self.answers: dict[str, Any] = {}

    def send(
        self,
        name: str,
        *values: float,
        timeout_s: float = 30.0,
        num_bytes: int = 10,
        shape: tuple[int, ...] = (1,),
        **whose: Any,
    ) -> Item:
        rows = np.array(values, np.float32).reshape(-1, *shape)

        def done(outputs: Tensors | None, error: MaasError | None) -> None:
            assert name not in self.answers, "answered twice"
            self.answers[name] = error if outputs is None else outputs["y"].ravel().tolist()

        return self.batcher.submit({"x": rows}, len(rows), num_bytes, self.loop.now + timeout_s, done, **whose)

    def finish_all(self) -> None:
        for _ in range(1000):
            self.loop.turn()
            if not self.engine.is_busy:
                return
            self.engine.end_run()
        raise AssertionError("the engine never became idle")
