"""Runs trials with Ray Tune, which starts them, reads their metrics and stops bad ones. Only this file uses ray.tune.

Ray's guide to Tune with Train (https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html) uses a
function trainable that calls the trainer's `fit`. A function cannot be asked to stop: Tune ends its process, and the
workers of a stopped trial would keep their CPUs. So a trial here is a class, whose `cleanup` ends its run in order.

The process of a trial reserves no CPU: the run's workers reserve theirs in the cluster, as with `maas-ray train`.
Tune's files about a search are discarded; searches and runs are in the store (log.py).
"""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from maas_ray.process.interrupts import SIGNALS, note, take_first
from maas_ray.train.search.log import MetricValue, TrialEnded, order
from maas_ray.train.search.spec import SchedulerSpec
from maas_ray.train.search.trial import TrialJob, TrialRun

_VALUE = "_metric"
"""The metric's name in Tune: without it a trial may report nothing for a while."""
_DONE = "part_done"
_HEARTBEAT_S = 2.0
"""Largest interval of a trial's reports to Tune, at which it can be stopped."""
_STOPS_TUNE = signal.SIGUSR1
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see `_signals`
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # runs write their own TensorBoard files
    "RAY_AIR_NEW_OUTPUT": "0",  # its banner ignores `verbose`
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of data are the same as for `maas-ray train`
}


def run_trials(
    jobs: Mapping[int, TrialJob],
    *,
    scheduler: SchedulerSpec,
    mode: str,
    past: Mapping[int, Sequence[MetricValue]],
    max_concurrent: int,
    time_limit_s: float | None,
    on_metric: Callable[[int, MetricValue], None],
    on_end: Callable[[int, TrialEnded], None],
) -> None:
    """Runs trials until all have ended or the time limit has passed; trials that are then running have no end.

    Args:
        jobs: the trials, by number.
        scheduler: the scheduler, which stops trials.
        mode: `min` or `max`.
        past: metrics of earlier trials, with which new ones are compared.
        max_concurrent: largest number of concurrent trials.
        time_limit_s: time limit.
        on_metric: called with each metric of a trial.
        on_end: called once for each ended trial.
    """
    follower = TrialFollower(on_metric, on_end)
    with _environment(), tempfile.TemporaryDirectory(prefix="maas-tune-") as directory:
        tune.Tuner(
            # One byte of memory: Tune requires a resource, and a CPU would be missing for the workers.
            tune.with_resources(_Trainable, {"CPU": 0, "memory": 1}),
            param_space={
                "trial": tune.grid_search([{"number": number, "job": vars(job)} for number, job in jobs.items()]),
                "directory": os.getcwd(),
            },
            tune_config=tune.TuneConfig(
                scheduler=scheduler_of(scheduler, mode, past, follower),
                max_concurrent_trials=max_concurrent,
                time_budget_s=time_limit_s,
                reuse_actors=False,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=directory,
                callbacks=[follower],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
                verbose=0,
            ),
        ).fit()


class _Trainable(tune.Trainable):  # type: ignore[misc]
    def setup(self, config: dict[str, Any]) -> None:
        if os.path.isdir(config["directory"]):
            os.chdir(config["directory"])
        self._trial = TrialRun(TrialJob(**config["trial"]["job"]))

    def step(self) -> dict[str, Any]:
        news = self._trial.next(_HEARTBEAT_S)
        if news is None:
            return {}
        if isinstance(news, MetricValue):
            return result_of(news)
        last = result_of(news.metrics[-1]) if news.metrics else {}
        return {**last, "done": True, "status": news.status, "error": news.error}

    def cleanup(self) -> None:
        self._trial.stop()


class _Asha(ASHAScheduler):  # type: ignore[misc]
    def __init__(self, spec: SchedulerSpec, mode: str, on_stop: Callable[[int], None]) -> None:
        super().__init__(
            time_attr=_DONE,
            metric=_VALUE,
            mode=mode,
            max_t=1,
            grace_period=spec.grace_period,
            reduction_factor=spec.reduction_factor,
            stop_last_trials=False,  # a trial at its end must commit its checkpoint
        )
        self._on_stop = on_stop

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == self.STOP:
            self._on_stop(_number(trial))
        return decision


class TrialFollower(tune.Callback):  # type: ignore[misc]
    """Forwards the reports of trials and determines the reason of each end."""

    def __init__(
        self, on_metric: Callable[[int, MetricValue], None], on_end: Callable[[int, TrialEnded], None]
    ) -> None:
        self._on_metric = on_metric
        self._on_end = on_end
        self._given_up: set[int] = set()
        self._said: dict[int, tuple[str, str | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles without its functions: Tune writes callbacks to a file that nobody reads, and a console has locks."""
        return TrialFollower, (_nobody, _nobody)

    def give_up(self, number: int) -> None:
        """Records the scheduler's decision."""
        self._given_up.add(number)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = _number(trial)
        if _VALUE in result:
            self._on_metric(number, MetricValue(result["step"], result[_DONE], result[_VALUE]))
        if "status" in result:
            self._said[number] = (result["status"], result["error"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = _number(trial)
        status, error = self._said.get(number, ("stopped" if number in self._given_up else None, None))
        if status is not None:
            self._on_end(number, TrialEnded(status, error=error))  # type: ignore[arg-type]

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        message = " ".join(str(trial.get_error() or "").split())[-500:]
        error = f"training_failed: the trial's process ended: {message or 'no message'}; --resume retries it"
        self._on_end(_number(trial), TrialEnded("failed", error=error))


def _nobody(number: int, event: MetricValue | TrialEnded) -> None:
    """Does nothing."""


def scheduler_of(
    spec: SchedulerSpec, mode: str, past: Mapping[int, Sequence[MetricValue]], follower: TrialFollower
) -> ASHAScheduler | FIFOScheduler:
    """Tune's scheduler with the metrics of earlier trials; it tells the follower which trials it stops."""
    if spec.name == "none":
        return FIFOScheduler()
    scheduler = _Asha(spec, mode, lambda number: None)
    known = {
        number: SimpleNamespace(trial_id=f"past-{number}", config={"trial": {"number": number}}) for number in past
    }
    for trial in known.values():
        scheduler.on_trial_add(None, trial)
    for number, metric in order(past):
        scheduler.on_trial_result(None, known[number], result_of(metric))
    scheduler._on_stop = follower.give_up
    return scheduler


def _name(trial: Any) -> str:
    return f"trial-{_number(trial)}"


def _number(trial: Any) -> int:
    number: int = trial.config["trial"]["number"]
    return number


def result_of(metric: MetricValue) -> dict[str, Any]:
    """A metric as a trial reports it to Tune."""
    return {_VALUE: metric.value, _DONE: metric.done, "step": metric.step}


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_ENVIRONMENT)
    logger.setLevel(logging.ERROR)  # it warns about files that are disabled
    try:
        with _signals():
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals() -> Iterator[None]:
    """The first terminating signal (SIGTERM: `ray job stop`) stops trials; a second one has its default effect.

    Tune stops trials at a SIGINT but does not report the signal; therefore it gets SIGUSR1, which it also handles.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    initial = signal.getsignal(_STOPS_TUNE)

    def stop_trials(number: int) -> None:
        if signal.getsignal(_STOPS_TUNE) is initial:  # Tune has no handler yet: there are no trials to stop
            signal.raise_signal(number)
            return
        note(number)
        signal.raise_signal(_STOPS_TUNE)

    restore = take_first([number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN], stop_trials)
    try:
        yield
    finally:
        restore()
        signal.signal(_STOPS_TUNE, initial or signal.SIG_DFL)
