"""An engine whose runs are made in a process of its own: `Engine`'s interface, so that nothing above knows which it is.

A process that dies during a run is replaced for the next one. Afterwards runs are made one at a time for a while, so that
each death is the work of one run, and a request that is repeated can be judged by itself.
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
"""Runs are made one at a time for so long after a death."""
MAX_PAUSE_S = 30.0
"""Longest pause after a process could not be started again."""


class ApartEngine:
    """Runs a bundle in a process of its own; as `Engine`, `run` may be called from as many threads as it has instances.

    Args:
        bundle: is kept, to start the process again.
        spec: of the engine in the process.
        process: has loaded the bundle.
        wall_s: longest time to load it again.
    """

    is_bounded = False
    """Runs are never made on the loop."""

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
        """Processes that have died during a run."""
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
        """As `Engine.timed_run`; blocks until the process has answered.

        Raises:
            EngineDied: the process died during this run, or during another one beside it.
            RunStopped: `stop` was set; a run that did not end by itself was ended with the process.
            MaasError: as `Engine.run`.
        """
        with self._turn():
            started_s = time.perf_counter()
            process, channel = self._take()
            try:
                outputs, _ = channel.run(inputs, num_rows, stop)
            except StopIgnored:
                self._end(process)
                raise RunStopped("the run did not end when nobody waited for it; its process was ended") from None
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
        """Ends the process; a run in progress fails."""
        with self._lock:
            self._is_closed = True
            self._retire()

    def _turn(self) -> AbstractContextManager[object]:
        return self._alone if time.monotonic() < self._alone_until_s else nullcontext()

    def _take(self) -> tuple[EngineProcess, RunChannel]:
        with self._lock:
            if self._process is not None and self._process.has_ended():
                self._retire()  # while nobody asked anything of it
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
            raise EngineFailed("the process that runs the model could not be started again; it is tried again soon")
        try:
            process = start_process(self._bundle, self._spec, self._wall_s)
        except MaasError as error:
            self._pause_s = min(MAX_PAUSE_S, max(1.0, 2 * self._pause_s))
            self._retry_at_s = time.monotonic() + self._pause_s
            log.error("the process of bundle %s could not be started again: %s", self._bundle.id, error)
            raise EngineFailed("the process that runs the model could not be started again") from error
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
        failure = EngineDied("the process that ran the model died during this run; the replica lives on")
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
        """Seeds the latency by runs from here: passing tensors on is a part of it."""
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
