"""What stands between a run's workers and its driver: an actor, and the thread that reads it to whoever asked.

The actor's process also starts the workers and watches them (train/ranks/launch.py). It imports Ray Train for that, which
takes 2 s: begin the actor first and read specs and data meanwhile. Imports neither torch nor ray.train itself.
"""

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maas_ray.errors import MaasError
from maas_ray.process.garbage import collect_rarely
from maas_ray.store.lease import Claim
from maas_ray.store.objects import StorageSpec
from maas_ray.train.loop.progress import Progress
from maas_ray.train.ranks.rank_registry import Directive, GroupAttempt, Heartbeat, RankRegistry

POLL_S = 0.5
TIMEOUT_S = 60.0
"""Longest wait for an answer of the actor."""
_LAUNCH = "maas_ray.train.ranks.launch"


@dataclass(frozen=True)
class Launch:
    """What starting a run's workers takes."""

    run: str
    name: str
    """Of this launch; Ray Train would silently resume its own state under a name it has seen."""
    spec: str
    """The TrainSpec as JSON, with an absolute store."""
    data_digest: str
    storage: StorageSpec
    sizes: tuple[int, ...]
    """Numbers of workers with which the run may go on, ascending."""
    together: int
    """Neighbouring ranks that have to be on one node."""
    cpus: int
    gpus: int
    max_restarts: int
    timeout_s: float
    placement_timeout_s: float
    scale_up_interval_s: float
    claim: Claim | None = None
    """The lease in whose name the ranks commit; None: nobody else can be there."""

    @property
    def resources(self) -> dict[str, float]:
        """What each worker takes, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.gpus else {})}


@ray.remote(num_cpus=0, max_concurrency=16)  # `train` takes one thread until the run ends; all others answer at once
class RunActor:
    """Holds the newest report of rank 0, the registry of the ranks, and an error that no further attempt can mend."""

    def __init__(self) -> None:
        self._ranks = RankRegistry()
        self._newest: Progress | None = None
        self._validated: Progress | None = None
        self._failure: MaasError | None = None
        self._is_checked = False
        self._is_allowed = False
        collect_rarely()
        importlib.import_module(_LAUNCH)  # by name: a driver that imports this file must not wait for Ray Train

    def train(self, job: Launch) -> MaasError | None:
        """Runs all attempts of a run to its end; returns the error that ended it, if one did."""
        launch = importlib.import_module(_LAUNCH).launch
        error: MaasError | None = launch(job, ray.get_runtime_context().current_actor, self._ranks)
        return self._failure or error

    def stop(self) -> None:
        """Ends the workers and frees their resources, if `train` goes on."""
        importlib.import_module(_LAUNCH).stop()

    def heartbeat(self, heartbeat: Heartbeat) -> Directive:
        """Takes what a rank says of itself, and tells it whether to leave."""
        return self._ranks.heartbeat(heartbeat)

    def ask(self, reason: str) -> None:
        """Asks the ranks to commit what they have; then the run ends."""
        self._ranks.ask(reason, is_final=True)

    def found_fit(self) -> None:
        """Rank 0 has found that model and data fit."""
        self._is_checked = True

    def is_checked(self) -> bool:
        """Whether model and data fit, as far as is known."""
        return self._is_checked

    def allow(self) -> None:
        """The run is written down, so the ranks may begin."""
        self._is_allowed = True

    def is_allowed(self) -> bool:
        """Whether the run is written down."""
        return self._is_allowed

    def put(self, progress: Progress) -> None:
        """Replaces the newest report, and the newest one with metrics if it has some."""
        self._newest = progress
        if progress.metrics:
            self._validated = progress

    def newest(self) -> list[Progress]:
        """The newest report with metrics of the validation split, and the newest of all, as far as there are such."""
        return [report for report in (self._validated, self._newest) if report is not None]

    def past(self) -> tuple[GroupAttempt, ...]:
        """The attempts that are over, oldest first."""
        return self._ranks.past

    def fail(self, error: MaasError) -> None:
        """Keeps the first such error; the ones that follow are its consequences."""
        self._failure = self._failure or error

    def failure(self) -> MaasError | None:
        """The error that ended the run for good, if there is one."""
        return self._failure


def start_run_actor() -> Any:
    """Begins a run's actor on this node and returns at once."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return RunActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class ProgressReader:
    """A thread that hands each new report on, and each attempt that ends, while the block runs.

    Args:
        actor: the run's.
        on_progress: called with each new report.
        on_attempt: called with each attempt that is over, in order.
    """

    def __init__(
        self,
        actor: Any,
        on_progress: Callable[[Progress], None] | None,
        on_attempt: Callable[[GroupAttempt], None] | None = None,
    ) -> None:
        self._actor = actor
        self._on_progress = on_progress
        self._on_attempt = on_attempt
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="training-progress", daemon=True)
        self.lost: ray.exceptions.RayError | None = None
        """Why the actor does not answer any more, if it does not."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=TIMEOUT_S)

    def _run(self) -> None:
        seen: list[Progress] = []
        num_past = 0
        while True:
            is_last = self._ended.wait(POLL_S)
            try:
                newest, past = ray.get([self._actor.newest.remote(), self._actor.past.remote()], timeout=TIMEOUT_S)
            except ray.exceptions.RayError as error:
                self.lost = error
                return
            for report in newest:
                if report not in seen and self._on_progress is not None:
                    self._on_progress(report)
                    seen = [*seen[-1:], report]
            for attempt in past[num_past:]:
                if self._on_attempt is not None:
                    with suppress(MaasError):  # a store that fails now is met again, where something depends on it
                        self._on_attempt(attempt)
            num_past = len(past)
            if is_last:
                return


def end_run_actor(actor: Any) -> None:
    """Ends a run's actor, and a training that it has begun."""
    # One that is dead already holds nothing that could be freed.
    with suppress(ray.exceptions.RayError):
        ray.get(actor.stop.remote(), timeout=TIMEOUT_S)
    ray.kill(actor)
