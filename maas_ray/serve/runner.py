"""Runs an engine for a batcher: short runs at once on the loop, longer ones in the engine's own threads."""

import asyncio
import logging
import math
import threading
import time
from queue import SimpleQueue

from maas_ray.bundle.engine import Engine
from maas_ray.errors import EngineFailed, MaasError
from maas_ray.serve.batcher import Finished
from maas_ray.serve.item import Tensors

log = logging.getLogger(__name__)

INLINE_BELOW_S = 300e-6
"""A run shorter than this is not worth a hop to a thread and back: 12 to 25 microseconds measured on uvloop, which a lone
request pays in full. With 32 and 128 callers neither way had the better tail for runs of up to 400 microseconds (the
loop's own work on those requests is longer than the run); a much longer run would keep the loop from reading."""

_DRIFT = 1.01
"""What the fastest known run loses with each later one, so that a model that has become slower is noticed."""

_Job = tuple[Tensors, int, Finished]


class EngineRunner:
    """A `Runner` on an engine; owns as many threads as the engine has streams, started by the first long run.

    Args:
        engine: what runs.
        loop: where `finished` is called.
        inline_below_s: expected seconds below which a run is made on the loop itself.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, inline_below_s: float = INLINE_BELOW_S) -> None:
        self.streams = engine.streams
        self.estimate_s = engine.latency.estimate_s
        self._engine = engine
        self._loop = loop
        self._inline_below_s = inline_below_s
        # A queue of our own: an executor's future and its lock cost more than the hop itself.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._fastest: dict[int, float] = {}
        """Seconds of the fastest run by the power of two of its rows."""

    def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> None:
        # Not by the mean: in a thread a run also waits for the interpreter's lock when it comes back, so on a busy
        # machine the mean of short runs would grow until all of them go through the thread, and stay there.
        fastest_s = self._fastest.get(num_rows.bit_length())
        if (self.estimate_s(num_rows) if fastest_s is None else fastest_s) < self._inline_below_s:
            outputs, error, run_s = self._run(inputs, num_rows)
            finished(outputs, error, run_s)
            return
        if not self._threads:
            # Daemons: a run that hangs in native code must not keep the process from ending.
            self._threads = [
                threading.Thread(target=self._work, name=f"engine-{number}", daemon=True)
                for number in range(self.streams)
            ]
            for thread in self._threads:
                thread.start()
        self._jobs.put((inputs, num_rows, finished))

    def close(self) -> None:
        """Gives the threads back; a run in progress ends by itself."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            inputs, num_rows, finished = job
            result = self._run(inputs, num_rows)
            del job, inputs  # this thread may now wait for long
            try:
                self._loop.call_soon_threadsafe(finished, *result)
            except RuntimeError:
                log.info("a run ended after its loop was closed; nobody waits for it")
            del result, finished

    def _run(self, inputs: Tensors, num_rows: int) -> tuple[Tensors | None, MaasError | None, float]:
        started_s = time.perf_counter()
        try:
            outputs, run_s = self._engine.timed_run(inputs, num_rows)
            bucket = num_rows.bit_length()
            fastest_s = self._fastest.get(bucket, math.inf) * _DRIFT
            self._fastest[bucket] = run_s if run_s < fastest_s else fastest_s
            return outputs, None, run_s
        except MaasError as error:
            log.info("a run failed: %s", error.__cause__ or error)
            return None, error, time.perf_counter() - started_s
        except Exception as error:  # whatever it is, the batcher must hear that the engine is free again
            log.exception("a run failed in an unexpected way")
            failure = EngineFailed("the model failed while it ran on these inputs; the replica's log has the cause")
            failure.__cause__ = error
            return None, failure, time.perf_counter() - started_s
