"""Trials under Ray Tune: which are given up, what that frees, and what a search says of one that failed."""

import math
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.progress import Progress
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.search.log import MetricValue, SearchLog, TrialEnded
from maas_ray.train.search.run import run_search
from maas_ray.train.search.spec import SchedulerSpec, TuneSpec
from maas_ray.train.search.trial import metric_of
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster

STEPS = 6000
ASHA = {"name": "asha", "grace_period": 0.1, "reduction_factor": 2}
GOOD, BAD, BROKEN = 0.01, 1e-9, 1e30


def _spec(store: ObstoreStore, **changes: Any) -> TuneSpec:
    base = {
        "model": {"name": "mlp", "params": {"size": 1}},
        "data": {"uri": "sklearn:digits", "task": "classification", "cleaning": {"tensor": {"scaling": "min_max"}}},
        "steps": STEPS,
        "validate_every": STEPS // 20,
        "checkpoint": {"every_steps": STEPS // 4},
        "storage": {"uri": store.uri},
    }
    fields = {
        "name": "s",
        "base": base,
        "search": {"optimizer.lr": {"kind": "grid_search", "values": [GOOD, BAD, BROKEN]}},
        "max_concurrent": 1,
        "scheduler": ASHA,
    }
    return parse_spec(TuneSpec, {**fields, **changes})


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_bad_trial_is_stopped_a_broken_one_reported_and_neither_ends_the_search(
    file_store: ObstoreStore, ray_cluster: RayCluster
) -> None:
    events: list[tuple[int, MetricValue | TrialEnded]] = []
    spec = _spec(file_store)
    result = run_search(spec, on_event=lambda trial, event: events.append((trial, event)))

    good, bad, broken = sorted(result.trials, key=lambda one: one.trial)
    assert (good.status, good.step) == ("finished", STEPS)
    assert bad.status == "stopped"
    assert bad.step is not None
    assert bad.step < STEPS
    assert broken.status == "failed"
    assert "lower optimizer.lr" in (broken.error or "")
    assert [event.status for _, event in events if isinstance(event, TrialEnded)] == ["finished", "stopped", "failed"]
    assert result.best == good

    runs = Runs(file_store)
    assert [runs.get(f"s-{trial}").status for trial in range(3)] == ["finished", "stopped", "failed"]
    (newest, *_) = list_checkpoints(file_store, checkpoints_prefix("s-1"))[::-1]
    assert newest < STEPS, "it committed what it had and could be resumed"
    deadline = time.monotonic() + 60
    while _free_cpus() < ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _free_cpus() == ray.cluster_resources()["CPU"], "what the workers held is free"

    best = TrainSpec.model_validate(result.best_spec)
    assert (best.run, best.optimizer.lr) == ("s-best", GOOD)

    events.clear()
    again = run_search(spec, resume=True, on_event=lambda trial, event: events.append((trial, event)))
    assert {trial for trial, _ in events} == {2}, "only the one that failed is tried again"
    assert again.best == good


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "ray_job_stop"])
def test_an_interrupted_search_continues_its_trials(
    file_store: ObstoreStore, ray_cluster: RayCluster, number: signal.Signals
) -> None:
    spec = _spec(
        file_store, search={"optimizer.lr": {"kind": "grid_search", "values": [GOOD]}}, scheduler={"name": "none"}
    )
    interrupts: list[MetricValue | TrialEnded] = []

    def interrupt(trial: int, event: MetricValue | TrialEnded) -> None:
        if not interrupts:
            signal.raise_signal(number)
        interrupts.append(event)

    term = signal.getsignal(signal.SIGTERM)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for what runs in its background
    try:
        result = run_search(spec, on_event=interrupt)
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    (trial,) = result.trials
    assert trial.status == "waiting"
    assert (result.num_waiting, result.is_complete) == (1, False)
    assert isinstance(interrupts[0], MetricValue)
    assert after is signal.default_int_handler, "Tune's own is gone with the search"
    assert signal.getsignal(signal.SIGTERM) is term
    (newest, *_) = list_checkpoints(file_store, checkpoints_prefix("s-0"))[::-1]
    assert 0 < newest < STEPS

    (before_it,) = [event.step for event in interrupts[:1] if isinstance(event, MetricValue)]
    (again,) = run_search(spec, resume=True).trials
    assert (again.status, again.step) == ("finished", STEPS)
    run = Runs(file_store).get("s-0")
    assert run.status == "finished"
    steps = [metric.step for metric in SearchLog(file_store, "s").ended()[0].metrics]
    assert steps == sorted(set(steps))
    assert before_it in steps, "others are compared with what it had before too"
    assert [attempt["first_step"] for attempt in run.attempts][-1] >= newest


@pytest.mark.parametrize(
    ("progress", "metric", "expected"),
    [
        (Progress(6, 24, 1.0, loss=0.5), "loss", MetricValue(6, 0.25, 0.5)),
        (Progress(6, 24, 1.0, loss=0.5), "validation_loss", None),
        (Progress(24, 24, 1.0, metrics={"loss": 0.4}), "validation_loss", MetricValue(24, 1.0, 0.4)),
        (Progress(24, 24, 1.0, metrics={"loss": 0.4}, of_step=18), "validation_loss", MetricValue(18, 0.75, 0.4)),
        (Progress(6, 24, 1.0, loss=math.nan), "loss", None),
    ],
    ids=["of_training", "another", "sync_validation", "async_validation", "no_number"],
)
def test_a_metric_counts_for_the_step_that_it_is_of(
    progress: Progress, metric: str, expected: MetricValue | None
) -> None:
    assert metric_of(progress, metric) == expected


def test_callbacks_of_a_search_need_not_be_picklable() -> None:
    from maas_ray.train.search.tune import TrialFollower, scheduler_of

    console = threading.RLock()  # as that of rich has one
    follower = TrialFollower(lambda *_: console.release(), lambda *_: console.release())
    with pytest.raises(TypeError, match="RLock"):
        cloudpickle.dumps(lambda: console)
    cloudpickle.dumps([follower, scheduler_of(SchedulerSpec.model_validate(ASHA), "min", {}, follower)])


def _answers(past: dict[int, tuple[MetricValue, ...]], values: list[float]) -> list[str]:
    """What the scheduler says to a new trial at a tenth, two tenths, … of its length."""
    from maas_ray.train.search.tune import TrialFollower, result_of, scheduler_of

    scheduler = scheduler_of(
        SchedulerSpec.model_validate(ASHA), "min", past, TrialFollower(lambda *_: None, lambda *_: None)
    )
    trial = SimpleNamespace(trial_id="new", config={"trial": {"number": 99}})
    scheduler.on_trial_add(None, trial)
    metrics = [MetricValue(i + 1, (i + 1) / 10, value) for i, value in enumerate(values)]
    return [scheduler.on_trial_result(None, trial, result_of(metric)) for metric in metrics]


def test_a_resumed_search_compares_new_trials_with_the_ones_before() -> None:
    past = {number: (MetricValue(1, 0.1, 1.0 + number), MetricValue(10, 1.0, 0.5 + number)) for number in range(4)}
    assert _answers({}, [9.0, 9.0]) == ["CONTINUE", "CONTINUE"], "there is nothing to compare it with"
    assert _answers(past, [9.0]) == ["STOP"]
    assert _answers(past, [0.9] * 10) == ["CONTINUE"] * 10
