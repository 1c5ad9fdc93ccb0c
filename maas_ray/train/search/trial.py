"""Runs one trial in a thread of this process: reports its metrics and stops it on request. Independent of ray.tune."""

import math
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from maas_ray.errors import MaasError, NotFound
from maas_ray.train.loop.progress import Progress
from maas_ray.train.ranks.run_actor import end_run_actor, start_run_actor
from maas_ray.train.search.log import MetricValue, TrialEnded
from maas_ray.train.spec.metrics import metrics_of

if TYPE_CHECKING:
    from maas_ray.store.objects import ObjectStore
    from maas_ray.train.records.runs import RunRecord

STOP_S = 60.0
"""Timeout for a stopped run to commit a checkpoint; its workers are then ended."""
_ASK_S = 10.0


@dataclass(frozen=True)
class TrialJob:
    """The arguments of a trial."""

    spec: str
    """The TrainSpec as JSON: its class imports torch, which this process does while the actor starts."""
    metric: str


class TrialRun:
    """Trains in a thread that its creation starts. An existing run is resumed, a finished one is not changed.

    Args:
        job: the trial.
    """

    def __init__(self, job: TrialJob) -> None:
        self._job = job
        self._actor = start_run_actor()
        self._news: queue.SimpleQueue[MetricValue | TrialEnded] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next(self, timeout_s: float) -> MetricValue | TrialEnded | None:
        """The next metric, or the end of the trial; None after the timeout."""
        try:
            return self._news.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Stops a running run: its workers commit a checkpoint, end and release their resources."""
        if not self._thread.is_alive():
            return
        with suppress(ray.exceptions.RayError):
            ray.get(self._actor.ask.remote("stopped by its search"), timeout=_ASK_S)
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            end_run_actor(self._actor)
            self._thread.join(STOP_S)
        self._note()

    def _run(self) -> None:
        try:
            step, metrics = self._train()
        except MaasError as error:
            self._news.put(TrialEnded("failed", error=f"{error.code}: {error}"))
        except BaseException as error:  # any error ends this trial, but not the search
            self._news.put(TrialEnded("failed", error=f"{type(error).__name__}: {error}"))
        else:
            self._news.put(self._end(step, metrics))

    def _train(self) -> tuple[int, dict[str, float]]:
        try:
            from maas_ray.store.objects import open_store
            from maas_ray.train.records.runs import Runs
            from maas_ray.train.run import run_training
            from maas_ray.train.spec.train import TrainSpec

            spec = TrainSpec.model_validate_json(self._job.spec)
        except BaseException:
            end_run_actor(self._actor)
            raise
        try:
            store = open_store(spec.storage)
            self._recall(store, Runs(store).get(spec.run))
            exists = True
        except NotFound:
            exists = False
        result = run_training(spec, resume=exists, on_progress=self._report, actor=self._actor)
        return result.step, result.metrics

    def _recall(self, store: "ObjectStore", run: "RunRecord") -> None:
        """Reports the metrics from before an interruption: other trials are compared with them, step by step."""
        from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, read_saved
        from maas_ray.data.stored.dataset import open_dataset
        from maas_ray.train.records.runs import checkpoints_prefix

        if not list_checkpoints(store, prefix := checkpoints_prefix(run.id)):
            return
        total = run.spec.total_steps(open_dataset(store, run.data_digest).num_rows["train"])
        for entry in read_saved(open_checkpoint(store, prefix)).history:
            metrics = entry.get("validation", {})
            self._report(Progress(int(entry["step"]), total, 0.0, loss=entry.get("loss"), metrics=metrics))

    def _note(self) -> None:
        """Records that the run was stopped, if its own record reports a failure."""
        from maas_ray.store.objects import open_store
        from maas_ray.train.records.runs import Runs
        from maas_ray.train.spec.train import TrainSpec

        spec = TrainSpec.model_validate_json(self._job.spec)
        runs = Runs(open_store(spec.storage))
        with suppress(NotFound):  # it was stopped before its start
            if runs.get(spec.run).status not in ("finished", "stopped"):
                runs.record(spec.run, {"type": "stopped"})

    def _report(self, progress: Progress) -> None:
        metric = metric_of(progress, self._job.metric)
        if metric is not None:
            self._news.put(metric)

    def _end(self, step: int, metrics: dict[str, float]) -> TrialEnded:
        value = metrics.get(self._job.metric)
        if value is None:
            names = ", ".join(sorted(metrics)) or "none"
            return TrialEnded(
                "failed", error=f"spec_invalid: the run has no metric {self._job.metric!r}; metrics: {names}"
            )
        return TrialEnded("finished", (MetricValue(step, 1.0, value),))


def metric_of(progress: Progress, metric: str) -> MetricValue | None:
    """The value of `metric` in a progress report, if it is finite."""
    value = progress.loss if metric == "loss" else metrics_of({"validation": progress.metrics}).get(metric)
    if value is None or not math.isfinite(value):
        return None
    step = progress.of_step or progress.step
    return MetricValue(step, step / progress.total_steps, value)
