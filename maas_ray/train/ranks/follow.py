"""Launches a run's ranks and follows them to the end: its record, its events, signals. Runs in the driver.

The ranks themselves are started and monitored in the process of the run's actor (train/ranks/ray_train).
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray

from maas_ray.checkpoint.catalog import open_checkpoint, read_saved
from maas_ray.display import get_logger
from maas_ray.errors import Conflict, MaasError, Preempted, TrainingFailed
from maas_ray.process.interrupts import Held, told_to_end
from maas_ray.store.lease import Lease
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.progress import Progress
from maas_ray.train.ranks.run_actor import POLL_S, TIMEOUT_S, Launch, ProgressReader
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.metrics import newest_metrics
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.export_check import PendingCheck

_QUICK_S = 0.05
"""Polling interval while a run starts."""

log = get_logger(__name__)


def fit_ranks(
    store: ObstoreStore,
    spec: TrainSpec,
    data_digest: str,
    on_progress: Callable[[Progress], None] | None,
    actor: Any,
    lease: Lease,
    create: Callable[[], object] | None = None,
) -> None:
    """Trains the run to its end.

    Args:
        store: the store.
        spec: the run.
        data_digest: the prepared data set.
        on_progress: see `run_training`.
        actor: the run's actor.
        lease: the run's lease.
        create: creates the run's record. Called after the checks of rank 0 and before training, so that an earlier
            error leaves no run behind; None: the record exists.
    """
    workers, sizes = spec.workers, tuple(layout.world for layout in spec.layouts())
    record = _RunLog(Runs(store), spec.run, sizes[-1], lease, create)
    check = None
    if create is not None and spec.export_check != "off":
        check = PendingCheck(spec, actor.check_export.remote(spec.model_dump_json(), data_digest))
    job = Launch(
        run=spec.run,
        name=f"{spec.run}-{uuid.uuid4().hex[:8]}",
        spec=spec.model_dump_json(),
        data_digest=data_digest,
        storage=spec.storage,
        sizes=sizes,
        together=spec.parallelism.together,
        cpus=workers.cpus,
        gpus=workers.gpus,
        max_restarts=workers.max_restarts,
        timeout_s=workers.timeout_s,
        placement_timeout_s=workers.placement_timeout_s,
        scale_up_interval_s=workers.scale_up_interval_s,
        claim=lease.claim,
    )
    with (
        told_to_end() as signals,
        ProgressReader(actor, on_progress, lambda attempt: record.note({"type": "attempt", **asdict(attempt)})) as seen,
    ):
        failure = _await(job, actor, record, seen, signals, check)
    if failure is not None:
        kind = "stopped" if isinstance(failure, Preempted) else "failed"
        record.note({"type": kind, "error": f"{failure.code}: {failure}"})
        raise failure
    saved = read_saved(open_checkpoint(store, checkpoints_prefix(spec.run)))
    stopper = spec.stopper()
    reason = stopper.follow(saved.history) if stopper is not None else None
    metrics = {**newest_metrics(saved.history), **Runs(store).validated(spec.run).get(saved.step, {})}
    record.note({"type": "finished", "step": saved.step, "reason": reason, "metrics": metrics})


class _RunLog:
    """Writes the record of a run and its events; without a record, no events.

    Every method raises `Conflict` after the loss of the lease, so that it writes nothing to a run of another owner.
    """

    def __init__(
        self, runs: Runs, run: str, num_workers: int, lease: Lease, create: Callable[[], object] | None
    ) -> None:
        self._lease = lease
        self._runs = runs
        self._run = run
        self._num_workers = num_workers
        self._create = create
        self.has_begun = False

    def begin(self) -> None:
        if self._create is not None:
            self._create()
            self._create = None
        self.has_begun = True
        self.note({"type": "started", "workers": self._num_workers})

    def note(self, event: Mapping[str, Any]) -> None:
        if self._create is None:
            self._lease.check()
            self._runs.record(self._run, event)

    @property
    def lost(self) -> Conflict | None:
        """The error if another owner has taken over the run, or None."""
        return self._lease.lost


def _await(
    job: Launch, actor: Any, record: _RunLog, seen: ProgressReader, signals: Held, check: PendingCheck | None
) -> MaasError | None:
    """Waits for the end of a launch; returns the error that ended it, or None after the last step.

    A run has no time limit; only the time without an answer of its actor is limited.
    """
    has_asked = False
    training = actor.train.remote(job)
    while True:
        try:
            done, _ = ray.wait([training], timeout=POLL_S if record.has_begun else _QUICK_S)
            if done:
                failure: MaasError | None = ray.get(training)
                return failure
            if seen.lost is not None:
                raise seen.lost
            if record.lost is not None:
                return record.lost
            is_checked = record.has_begun or ray.get(actor.is_checked.remote(), timeout=TIMEOUT_S)
            if not record.has_begun and is_checked and (check is None or check.is_done()):
                if check is not None and (refused := check.failure()) is not None:
                    return refused
                record.begin()
                ray.get(actor.allow.remote(), timeout=TIMEOUT_S)
            if signals.number is not None and not has_asked:
                has_asked = True
                log.warning(
                    "%s: the run stops at its next step and commits a checkpoint; a second signal ends it immediately",
                    signals.number.name,
                )
                ray.get(actor.ask.remote(signals.number.name), timeout=TIMEOUT_S)
        except ray.exceptions.RayError as error:
            return TrainingFailed(
                f"run {job.run!r} lost the actor that monitors its workers: {error}; committed checkpoints are kept: "
                "continue with --resume"
            )
