"""Runs a search: draws the trials, runs those that have not ended, ranks all. Independent of ray.tune."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from maas_ray.store.lease import Lease, take
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.store.probe import probe
from maas_ray.train.search.log import MetricValue, SearchLog, TrialEnded
from maas_ray.train.search.space import Trial, draw_trials, run_id
from maas_ray.train.search.spec import TuneSpec
from maas_ray.train.search.trial import TrialJob

BEST = "best"
"""Suffix of the best spec's run, instead of a trial's number."""


@dataclass(frozen=True)
class TrialResult:
    """The current state of a trial."""

    trial: int
    run: str
    fields: Mapping[str, Any]
    status: str
    """`finished`, `stopped` (by the scheduler), `failed`, or `waiting`: not ended, resume the search."""
    step: int | None = None
    """Optimizer step of `value`."""
    value: float | None = None
    """The newest value of the search's metric."""
    error: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    search: str
    metric: str
    mode: str
    trials: list[TrialResult]
    """All trials, the best first; those without a metric last."""
    best: TrialResult | None
    """The best finished trial; if none has finished, the best stopped one."""
    best_spec: dict[str, Any] | None
    """A TrainSpec with the values of the best trial, for a new run."""

    time_limit_s: float | None = None
    """Time limit of the search; trials that have not ended by then need a resume."""

    @property
    def num_waiting(self) -> int:
        """Number of trials that have not ended: the search was interrupted, or its time limit passed."""
        return sum(one.status == "waiting" for one in self.trials)

    @property
    def is_complete(self) -> bool:
        """Whether a best trial exists and no trial was interrupted."""
        return self.best is not None and (self.time_limit_s is not None or not self.num_waiting)


def run_search(
    spec: TuneSpec, *, resume: bool = False, on_event: Callable[[int, MetricValue | TrialEnded], None] | None = None
) -> SearchResult:
    """Runs a search to its end or its time limit. Needs a connected Ray (`ray.init`).

    Args:
        spec: the search.
        resume: continue an existing search: finished and stopped trials do not run again, interrupted trials continue
            from their newest checkpoint, and failed trials are retried.
        on_event: called with the number of a trial and each of its metrics, and its end.

    Raises:
        SpecError: the space or a trial is invalid; with `resume`, fixed fields of the search differ.
        Conflict: the search exists and `resume` is False, or another process runs it.
        NotFound: `resume` is True and the search does not exist.
        StoreError: the store is not usable.
    """
    trials = draw_trials(spec)
    store = open_store(trials[0].spec.storage)
    probe(store)
    log = SearchLog(store, spec.name)
    if not resume:
        log.refuse_existing()
    hint = "wait for it, or choose another name; if that process is dead, --resume takes over the search"
    with take(store, log.prefix, f"search {spec.name!r} of {store.uri}", waits=resume, hint=hint) as lease:
        (log.resume if resume else log.begin)(spec)
        return _run_trials(spec, store, trials, log, lease, on_event)


def _run_trials(
    spec: TuneSpec,
    store: ObstoreStore,
    trials: list[Trial],
    log: SearchLog,
    lease: Lease,
    on_event: Callable[[int, MetricValue | TrialEnded], None] | None,
) -> SearchResult:
    over = {number: ended for number, ended in log.ended().items() if ended.status != "failed"}
    going = [trial for trial in trials if trial.number not in over]
    metrics: dict[int, list[MetricValue]] = {}

    def add_metric(number: int, metric: MetricValue) -> None:
        known = metrics.setdefault(number, [])
        if known and known[-1].step == metric.step:  # the last metric is reported twice: on arrival and at the end
            return
        known.append(metric)
        if on_event is not None:
            on_event(number, metric)

    def end(number: int, ended: TrialEnded) -> None:
        ended = TrialEnded(ended.status, tuple(metrics.get(number, ())), ended.error)
        lease.check()
        log.record(number, ended)
        if on_event is not None:
            on_event(number, ended)

    if going:
        from maas_ray.train.search.tune import run_trials  # late: ray.tune takes seconds to import

        run_trials(
            {trial.number: _job(trial, spec.metric, store) for trial in going},
            scheduler=spec.scheduler,
            mode=spec.direction,
            past={number: ended.metrics for number, ended in over.items()},
            max_concurrent=min(spec.max_concurrent or len(going), _room(going)),
            time_limit_s=spec.time_limit_s,
            on_metric=add_metric,
            on_end=end,
        )
    return rank(spec, trials, log.ended(), metrics)


def rank(
    spec: TuneSpec, trials: list[Trial], ended: Mapping[int, TrialEnded], running: Mapping[int, list[MetricValue]]
) -> SearchResult:
    """The result from the ended trials and from the metrics of the others."""
    sign = 1 if spec.direction == "min" else -1
    outcomes = [_outcome(trial, ended.get(trial.number), running.get(trial.number, [])) for trial in trials]
    outcomes.sort(key=lambda one: (one.value is None, 0 if one.value is None else sign * one.value, one.trial))
    candidates = [one for status in ("finished", "stopped") for one in outcomes if one.status == status]
    best = candidates[0] if candidates else None
    best_spec = None
    if best is not None:
        best_spec = {**trials[best.trial].document, "run": f"{spec.name}-{BEST}"}
    return SearchResult(spec.name, spec.metric, spec.direction, outcomes, best, best_spec, spec.time_limit_s)


def describe(spec: TuneSpec, trial: int, event: MetricValue | TrialEnded) -> str:
    """A line for an event of a trial: `digits-search-3: step 59, validation_accuracy 0.528`."""
    run = run_id(spec.name, trial)
    if isinstance(event, MetricValue):
        return f"{run}: step {event.step}, {spec.metric} {event.value:.4g}"
    metric = f"{spec.metric} {event.metrics[-1].value:.4g}" if event.metrics else ""
    return f"{run}: {event.status} {event.error or metric}".rstrip()


def _outcome(trial: Trial, ended: TrialEnded | None, running: list[MetricValue]) -> TrialResult:
    metrics = ended.metrics if ended is not None else running
    last = metrics[-1] if metrics and math.isfinite(metrics[-1].value) else None
    return TrialResult(
        trial.number,
        trial.run,
        trial.fields,
        ended.status if ended is not None else "waiting",
        last.step if last is not None else None,
        last.value if last is not None else None,
        ended.error if ended is not None else None,
    )


def _job(trial: Trial, metric: str, store: ObstoreStore) -> TrialJob:
    # Trials run in other processes, possibly on other machines: they need the absolute location.
    storage = trial.spec.storage.model_copy(update={"uri": store.uri})
    changes: dict[str, Any] = {"storage": storage}
    if trial.number:
        changes["export_check"] = "off"  # the first trial is checked, and the others have the same modules
    return TrialJob(trial.spec.model_copy(update=changes).model_dump_json(), metric)


def _room(trials: list[Trial]) -> int:
    """Number of trials, at least one, that fit into the cluster's resources at a time; the largest trial decides."""
    total = ray.cluster_resources()
    room = []
    for trial in trials:
        workers, validation, world = trial.spec.workers, trial.spec.validation, trial.spec.layouts()[-1].world
        needs = {"CPU": world * workers.cpus, "GPU": world * workers.gpus}
        if validation.is_async:
            needs = {"CPU": needs["CPU"] + validation.cpus, "GPU": needs["GPU"] + validation.gpus}
        room += [int(total.get(name, 0) // need) for name, need in needs.items() if need]
    return max(1, min(room))
