"""Runs an engine for a batcher: short runs inline on the loop, all others in the engine's own threads."""

import asyncio
import threading
import time
from queue import SimpleQueue
from typing import NamedTuple

from maas_ray.bundle.engine.providers import CPU
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.bundle.loading import AnyEngine
from maas_ray.display import get_logger
from maas_ray.errors import EngineFailed, MaasError, RunStopped
from maas_ray.serve.batching.inline import INLINE_BELOW_S, InlineRule
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.batching.protocols import Finished

log = get_logger(__name__)

Result = tuple[Tensors | None, MaasError | None, float]
"""Outputs or error, and the run time in seconds."""


class _QueuedRun(NamedTuple):
    """A run for the threads."""

    inputs: Tensors
    num_rows: int
    finished: Finished | None
    """None: the run is repeated only to measure its time."""
    stop: StopSignal


class EngineRunner:
    """A `Runner` for an engine; has one thread per instance of the engine, started with the first long run.

    Args:
        engine: executes the runs.
        loop: loop on which `finished` is called.
        inline_below_s: expected seconds below which a run executes on the loop itself.
    """

    def __init__(
        self, engine: AnyEngine, loop: asyncio.AbstractEventLoop, inline_below_s: float = INLINE_BELOW_S
    ) -> None:
        self.instances = engine.instances
        self.estimate_s = engine.latency.estimate_s
        self.form_of = engine.form_of if engine.has_free_sizes else None
        self._engine = engine
        self._loop = loop
        self.rule = InlineRule(engine, inline_below_s)
        """Which runs execute on the loop."""
        # A queue of our own: an executor's future and its lock cost more than the hop itself.
        self._jobs: SimpleQueue[_QueuedRun | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> StopSignal | None:
        """Starts a run; see `Runner`. The returned signal stops it early; None if it ran inline and has ended."""
        if self.rule.is_short(inputs, num_rows):
            outputs, error, run_s = self._run(inputs, num_rows)
            if run_s > self.rule.slow_s and self.rule.suspect():
                self._put(_QueuedRun(inputs, num_rows, None, StopSignal()))
            finished(outputs, error, run_s)
            return None
        stop = StopSignal()
        self._put(_QueuedRun(inputs, num_rows, finished, stop))
        return stop

    def close(self) -> None:
        """Ends the threads; a current run ends by itself."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []

    def _put(self, job: _QueuedRun) -> None:
        if not self._threads:
            # Daemons: a run that hangs in native code must not prevent the end of the process.
            self._threads = [
                threading.Thread(target=self._work, name=f"engine-{number}", daemon=True)
                for number in range(self.instances)
            ]
            for thread in self._threads:
                thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            finished = job.finished
            result, spent_s = self._run_measured(job)
            del job  # this thread may now wait for a long time
            try:
                if finished is None:
                    self._loop.call_soon_threadsafe(self.rule.judge, spent_s)
                else:
                    if spent_s:
                        self._loop.call_soon_threadsafe(self.rule.note_spent, spent_s)
                    self._loop.call_soon_threadsafe(finished, *result)
            except RuntimeError:
                log.info("a run ended after its loop was closed; its result is discarded")
            del result, finished

    def _run_measured(self, job: _QueuedRun) -> tuple[Result, float]:
        """Returns the result, and the time that the run itself used; 0 if that is not needed."""
        if job.stop.is_set:
            return (None, RunStopped("the run was cancelled before it started"), 0.0), 0.0
        if job.finished is not None and not self.rule.is_off:
            return self._run(job.inputs, job.num_rows, job.stop), 0.0
        cpu_s = time.thread_time()
        result = self._run(job.inputs, job.num_rows, job.stop)
        if self._engine.providers[0] != CPU:
            return result, result[2]
        # Processor time, since on a busy machine any run can seem long; all threads of the run do equal work.
        return result, min(result[2], (time.thread_time() - cpu_s) * self._engine.threads)

    def _run(self, inputs: Tensors, num_rows: int, stop: StopSignal | None = None) -> Result:
        started_s = time.perf_counter()
        try:
            outputs, run_s = self._engine.timed_run(inputs, num_rows, stop)
            self.rule.note(inputs, num_rows, run_s)
            return outputs, None, run_s
        except MaasError as error:
            log.info("a run failed: %s", error.__cause__ or error)
            return None, error, time.perf_counter() - started_s
        except Exception as error:  # in any case the batcher must learn that the engine is free again
            log.exception("a run failed unexpectedly")
            failure = EngineFailed("the model failed on these inputs; the replica's log has the cause")
            failure.__cause__ = error
            return None, failure, time.perf_counter() - started_s
