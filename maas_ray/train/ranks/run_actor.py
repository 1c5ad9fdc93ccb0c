"""The actor between a run's workers and its driver, and the driver's thread that reads the actor.

The actor's process also starts the workers and monitors them (train/ranks/ray_train). Its import of Ray Train takes
2 s: start the actor first and read specs and data meanwhile. This module imports neither torch nor ray.train.
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
from maas_ray.train.validation.export_check import ExportVerdict, prepare_check, run_check

POLL_S = 0.5
TIMEOUT_S = 60.0
"""Timeout for an answer of the actor."""
_LAUNCH = "maas_ray.train.ranks.ray_train.launch"


@dataclass(frozen=True)
class Launch:
    """The settings for the start of a run's workers."""

    run: str
    name: str
    """Unique name of this launch: under a known name Ray Train would silently resume its own state."""
    spec: str
    """The TrainSpec as JSON, with an absolute store."""
    data_digest: str
    storage: StorageSpec
    sizes: tuple[int, ...]
    """Valid numbers of workers, ascending."""
    together: int
    """Number of adjacent ranks that must share a node."""
    cpus: int
    gpus: int
    max_restarts: int
    timeout_s: float
    placement_timeout_s: float
    scale_up_interval_s: float
    claim: Claim | None = None
    """The lease under which the ranks commit; None: no other process can write to the run."""

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.gpus else {})}


@ray.remote(
    num_cpus=0, max_concurrency=16
)  # `train` uses one thread until the run ends, the check of the export two for some seconds; others return immediately
class RunActor:
    """Keeps the latest report of rank 0, the registry of the ranks, and a fatal error."""

    def __init__(self) -> None:
        self._ranks = RankRegistry()
        self._newest: Progress | None = None
        self._validated: Progress | None = None
        self._failure: MaasError | None = None
        self._is_checked = False
        self._is_allowed = False
        collect_rarely()
        importlib.import_module(_LAUNCH)  # by name: a driver that imports this file must not import Ray Train

    def train(self, job: Launch) -> MaasError | None:
        """Runs all attempts of a run; returns the error that ended it, or None."""
        launch = importlib.import_module(_LAUNCH).launch
        error: MaasError | None = launch(job, ray.get_runtime_context().current_actor, self._ranks)
        return self._failure or error

    def stop(self) -> None:
        """Ends the workers and frees their resources, if `train` is running."""
        importlib.import_module(_LAUNCH).stop()

    def heartbeat(self, heartbeat: Heartbeat) -> Directive:
        """Records the heartbeat of a rank and returns the directive."""
        return self._ranks.heartbeat(heartbeat)

    def ask(self, reason: str) -> None:
        """Asks the ranks to commit a checkpoint, after which the run ends."""
        self._ranks.ask(reason, is_final=True)

    def prepare_export_check(self) -> None:
        """Starts the process of `check_export`, whose imports take seconds."""
        prepare_check()

    def check_export(self, spec: str, data_digest: str) -> ExportVerdict:
        """Whether the model of a spec can be published; takes seconds, in a child process."""
        return run_check(spec, data_digest)

    def found_fit(self) -> None:
        """Records that the checks of rank 0 have passed."""
        self._is_checked = True

    def is_checked(self) -> bool:
        """Whether the checks of rank 0 have passed."""
        return self._is_checked

    def allow(self) -> None:
        """Records that the run's record exists, so that the ranks can start."""
        self._is_allowed = True

    def is_allowed(self) -> bool:
        """Whether the run's record exists."""
        return self._is_allowed

    def put(self, progress: Progress) -> None:
        """Replaces the latest report, and the latest one with validation metrics if it has some."""
        self._newest = progress
        if progress.metrics:
            self._validated = progress

    def newest(self) -> list[Progress]:
        """The latest report with validation metrics and the latest of all, if they exist."""
        return [report for report in (self._validated, self._newest) if report is not None]

    def past(self) -> tuple[GroupAttempt, ...]:
        """The ended attempts, oldest first."""
        return self._ranks.past

    def fail(self, error: MaasError) -> None:
        """Keeps the first fatal error; later ones are its consequences."""
        self._failure = self._failure or error

    def failure(self) -> MaasError | None:
        """The fatal error of the run, or None."""
        return self._failure


def start_run_actor() -> Any:
    """Starts a run's actor on this node and returns immediately."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return RunActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class ProgressReader:
    """A thread that forwards each new report and each ended attempt during the block.

    Args:
        actor: the run's actor.
        on_progress: called with each new report.
        on_attempt: called with each ended attempt, in order.
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
        """The error of a lost actor, or None."""

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
                    with suppress(MaasError):  # an error of the store will recur where it matters
                        self._on_attempt(attempt)
            num_past = len(past)
            if is_last:
                return


def end_run_actor(actor: Any) -> None:
    """Ends a run's actor and its training."""
    # A dead actor holds no resources.
    with suppress(ray.exceptions.RayError):
        ray.get(actor.stop.remote(), timeout=TIMEOUT_S)
    ray.kill(actor)
