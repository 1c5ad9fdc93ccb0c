"""An engine that runs its graph in a separate process, with the interface of `Engine`.

A process that dies during a run is replaced for the next one. Afterward, runs are executed one at a time for a while,
so that each death is caused by one run, and a repeated request can be judged separately.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from maas_ray.bundle.apart.process import EngineProcess, RunChannel, StopIgnored, start_process
from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.engine import EngineSpec
from maas_ray.bundle.engine.forms import Form, FormLatencies, form_of, has_free_sizes
from maas_ray.bundle.engine.latency import LatencyModel
from maas_ray.bundle.engine.padding import Padding
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.bundle.engine.warmup import guesses, repeated
from maas_ray.bundle.format import Bundle
from maas_ray.bundle.nature import Nature
from maas_ray.bundle.sample import read_sample
from maas_ray.display import get_logger
from maas_ray.errors import EngineDied, EngineFailed, MaasError, RunStopped

log = get_logger(__name__)

ALONE_S = 30.0
"""Seconds after a death in which runs are executed one at a time."""
MAX_PAUSE_S = 30.0
"""Longest pause after a process could not be restarted."""


class ApartEngine:
    """Runs a bundle in a separate process; as for `Engine`, as many threads as instances may call `run`.

    Args:
        bundle: the bundle, kept to restart the process.
        spec: spec of the engine in the process.
        process: process that has loaded the bundle.
        wall_s: longest time to load it again.
    """

    is_bounded = False
    """Runs are never executed on the event loop."""

    def __init__(self, bundle: Bundle, spec: EngineSpec, process: EngineProcess, wall_s: float) -> None:
        self.nature: Nature = process.nature
        self.signature = self.nature.signature
        self.providers = self.nature.providers
        self.not_merged_because = self.nature.not_merged_because
        self.can_merge = not self.not_merged_because
        padded = self.nature.signature.padded
        self.padding = None if padded is None or self.nature.not_padded_because else Padding(padded)
        self.warmed_with = self.nature.warmed_with
        self.instances = spec.instances
        self.threads = max(1, spec.threads)
        self.num_deaths = 0
        """Number of processes that died during a run."""
        self._bundle = bundle
        self._spec = spec
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._alone_until_s = 0.0
        self._process: EngineProcess | None = process
        self._free: list[RunChannel] = list(process.channels)
        self._pause_s = 0.0
        self._retry_at_s = 0.0
        self._is_closed = False
        self.has_free_sizes = has_free_sizes(self.signature)
        self.latency: LatencyModel | FormLatencies = self._new_latency()
        self._measure()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Engine.run`; `EngineDied` if the process dies."""
        num_rows = next((len(array) if array.ndim else 1 for array in inputs.values()), 1)
        return self.timed_run(inputs, num_rows)[0]

    def timed_run(
        self, inputs: Mapping[str, Array], num_rows: int, stop: StopSignal | None = None
    ) -> tuple[dict[str, Array], float]:
        """As `Engine.timed_run`; blocks until the process responds.

        Raises:
            EngineDied: the process died during this run or a concurrent one.
            RunStopped: `stop` was set; a run that did not end by itself was stopped with its process.
            MaasError: as `Engine.run`.
        """
        with self._turn():
            started_s = time.perf_counter()
            process, channel = self._take()
            try:
                outputs, _ = channel.run(inputs, num_rows, stop)
            except StopIgnored:
                self._end(process)
                raise RunStopped("the run was canceled but did not end; its process was stopped") from None
            except (EOFError, OSError):
                raise self._died(process) from None
            finally:
                self._give(process, channel)
            run_s = time.perf_counter() - started_s
        self.latency.record(num_rows, run_s, self.form_of(inputs))
        return outputs, run_s

    def form_of(self, inputs: Mapping[str, Array]) -> Form:
        """As `Engine.form_of`."""
        return form_of(inputs, has_rows=self.signature.is_batched) if self.has_free_sizes else ()

    def abort(self) -> None:
        """Kills the process, from any thread: its runs end with `EngineDied`."""
        process = self._process
        if process is not None:
            process.child.abort()

    def close(self) -> None:
        """Stops the process; a run in progress fails."""
        with self._lock:
            self._is_closed = True
            self._retire()

    def _turn(self) -> AbstractContextManager[object]:
        return self._alone if time.monotonic() < self._alone_until_s else nullcontext()

    def _take(self) -> tuple[EngineProcess, RunChannel]:
        with self._lock:
            if self._process is not None and self._process.has_ended():
                self._retire()  # it ended while it was idle
            if self._process is None:
                self._start()
            process = self._process
            if process is None or not self._free:
                raise EngineFailed("more runs were started than the engine has instances")
            return process, self._free.pop()

    def _give(self, process: EngineProcess, channel: RunChannel) -> None:
        with self._lock:
            if process is self._process:
                self._free.append(channel)
            else:
                channel.close()

    def _start(self) -> None:
        if self._is_closed:
            raise EngineFailed("the model was unloaded")
        if time.monotonic() < self._retry_at_s:
            raise EngineFailed("the process of the model could not be restarted; the replica will retry soon")
        try:
            process = start_process(self._bundle, self._spec, self._wall_s)
        except MaasError as error:
            self._pause_s = min(MAX_PAUSE_S, max(1.0, 2 * self._pause_s))
            self._retry_at_s = time.monotonic() + self._pause_s
            log.error("the process of bundle %s could not be restarted: %s", self._bundle.id, error)
            raise EngineFailed("the process of the model could not be restarted; see the replica's log") from error
        self._pause_s = 0.0
        self._process, self._free = process, list(process.channels)

    def _died(self, process: EngineProcess) -> MaasError:
        reason = process.child.why_it_died()
        with self._lock:
            self._alone_until_s = time.monotonic() + ALONE_S
            if process is self._process:
                self.num_deaths += 1
                log.warning("the process of bundle %s died during a run: %s", self._bundle.id, reason)
                self._retire()
        failure = EngineDied("the process of the model died during this run; the replica is not affected")
        failure.__cause__ = reason
        return failure

    def _end(self, process: EngineProcess) -> None:
        with self._lock:
            if process is self._process:
                self._retire()

    def _retire(self) -> None:
        process, free, self._process, self._free = self._process, self._free, None, []
        if process is not None:
            process.child.close()
        for channel in free:
            channel.close()

    def _measure(self) -> None:
        """Seeds the latency model by runs from this process, which include the transfer of tensors."""
        if not self.warmed_with:
            return
        known = (
            []
            if self._bundle.sample is None
            else [repeated(read_sample(self._bundle.sample, self.signature), self.signature)]
        )
        guess = next(g for g in (*known, *guesses(self.signature)) if g.name == self.warmed_with)
        measured = self._new_latency()
        until = time.perf_counter() + self._spec.warmup_budget_s
        for num_rows in sorted(self._spec.warmup_rows) if self.signature.is_batched else [1]:
            inputs = guess.values(num_rows)
            try:
                times = [self.timed_run(inputs, num_rows)[1] for _ in range(self._spec.warmup_runs)]
            except MaasError:
                break
            measured.record(num_rows, min(times, default=0.0), self.form_of(inputs))
            if time.perf_counter() > until:
                break
        self.latency = measured

    def _new_latency(self) -> LatencyModel | FormLatencies:
        return FormLatencies() if self.has_free_sizes else LatencyModel()
