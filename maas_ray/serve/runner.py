"""Runs an engine for a batcher: short runs at once on the loop, longer ones in the engine's own thread."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from maas_ray.bundle.engine import Engine
from maas_ray.errors import MaasError
from maas_ray.serve.queue import Done, Tensors

log = logging.getLogger(__name__)

INLINE_BELOW_S = 300e-6
"""A run shorter than this is not worth a hop to a thread and back, which was measured at about 60 microseconds plus
a fight for the interpreter's lock; a longer one would keep the loop from reading requests."""


class EngineRunner:
    """A `Runner` on an engine; owns one thread, started by the first long run.

    Args:
        engine: what runs.
        loop: where `finished` is called.
        inline_below_s: expected seconds below which a run is made on the loop itself.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, inline_below_s: float = INLINE_BELOW_S) -> None:
        self._engine = engine
        self._loop = loop
        self._inline_below_s = inline_below_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def start(self, inputs: Tensors, num_rows: int, finished: Done) -> None:
        if self._engine.timing.estimate_s(num_rows) < self._inline_below_s:
            finished(*self._run(inputs))
        else:
            self._thread.submit(self._run_in_thread, inputs, finished)

    def estimate_s(self, num_rows: int) -> float:
        return self._engine.timing.estimate_s(num_rows)

    def close(self) -> None:
        """Gives the thread back; a run in progress ends by itself."""
        self._thread.shutdown(wait=False)

    def _run_in_thread(self, inputs: Tensors, finished: Done) -> None:
        outputs, error = self._run(inputs)
        try:
            self._loop.call_soon_threadsafe(finished, outputs, error)
        except RuntimeError:
            log.info("a run ended after its loop was closed; nobody waits for it")

    def _run(self, inputs: Tensors) -> tuple[Tensors | None, MaasError | None]:
        try:
            return self._engine.run(inputs), None
        except MaasError as error:
            log.info("a run failed: %s", error.__cause__ or error)
            return None, error
        except Exception as error:  # whatever it is, the batcher must hear that the engine is free again
            log.exception("a run failed in an unexpected way")
            failure = MaasError("the model failed while it ran on these inputs; the replica's log has the cause")
            failure.__cause__ = error
            return None, failure
