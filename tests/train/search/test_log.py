"""What a search leaves in the store, and what a resumed one makes of it."""

from typing import Any

import pytest

from maas_ray.errors import Conflict, NotFound, SpecError
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.search.log import MetricValue, SearchLog, TrialEnded, order
from maas_ray.train.search.run import rank, run_search
from maas_ray.train.search.space import draw_trials
from maas_ray.train.search.spec import TuneSpec
from tests.train.search.test_space import BASE, LR


def _spec(store: ObstoreStore, **changes: Any) -> TuneSpec:
    fields = {"name": "s", "base": {**BASE, "storage": {"uri": store.uri}}, "search": {"optimizer.lr": LR}, "trials": 4}
    return parse_spec(TuneSpec, {**fields, **changes})


def _metrics(*values: float) -> tuple[MetricValue, ...]:
    return tuple(MetricValue(10 * (i + 1), (i + 1) / len(values), value) for i, value in enumerate(values))


def test_a_search_is_begun_once_and_resumed_only_as_the_same(store: ObstoreStore) -> None:
    spec, log = _spec(store), SearchLog(store, "s")
    with pytest.raises(NotFound, match="start it without --resume"):
        log.resume(spec)
    log.begin(spec)
    with pytest.raises(Conflict, match="continue it with --resume"):
        log.begin(spec)
    log.resume(_spec(store, trials=9, time_limit_s=5, max_concurrent=1, scheduler={"name": "asha"}))
    for changes, name in (
        ({"seed": 1}, "seed"),
        ({"metric": "validation_accuracy"}, "metric, mode"),
        ({"base": {**BASE, "steps": 4}}, "base"),
        ({"search": {"optimizer.lr": {**LR, "upper": 1.0}}}, "search"),
    ):
        with pytest.raises(SpecError, match=f"started with other values of {name},"):
            log.resume(_spec(store, **changes))


def test_the_newest_end_of_each_trial_counts(file_store: ObstoreStore) -> None:
    log = SearchLog(file_store, "s")
    assert log.ended() == {}
    log.record(1, TrialEnded("failed", error="data_invalid: no rows"))
    log.record(0, TrialEnded("stopped", _metrics(3.0, 2.0)))
    log.record(1, TrialEnded("finished", _metrics(1.0)))
    assert log.ended() == {0: TrialEnded("stopped", _metrics(3.0, 2.0)), 1: TrialEnded("finished", _metrics(1.0))}


def test_metrics_come_to_the_scheduler_as_if_trials_had_trained_side_by_side() -> None:
    past = {7: _metrics(4.0, 3.0), 2: _metrics(9.0, 8.0, 7.0, 6.0)}
    assert [(number, metric.value) for number, metric in order(past)] == [(2, 9.0), (2, 8.0), (7, 4.0), (2, 7.0), (2, 6.0), (7, 3.0)]  # fmt: skip


ENDED = {
    0: TrialEnded("finished", _metrics(2.0, 1.5)),
    1: TrialEnded("stopped", _metrics(0.1)),
    2: TrialEnded("failed", error="model_invalid: no such layer"),
    3: TrialEnded("finished", _metrics(2.0, 0.5)),
}


def test_the_best_is_the_best_of_those_that_finished(file_store: ObstoreStore) -> None:
    spec = _spec(file_store)
    result = rank(spec, draw_trials(spec), ENDED, {})
    assert [(one.trial, one.status, one.value) for one in result.trials] == [
        (1, "stopped", 0.1),
        (3, "finished", 0.5),
        (0, "finished", 1.5),
        (2, "failed", None),
    ]
    assert result.best is not None
    assert result.best.run == "s-3"
    assert result.best_spec == {**draw_trials(spec)[3].document, "run": "s-best"}
    assert result.trials[-1].error == "model_invalid: no such layer"
    largest = rank(_spec(file_store, metric="validation_accuracy"), draw_trials(spec), ENDED, {})
    assert largest.best is not None
    assert largest.best.run == "s-0"


def test_without_a_finished_trial_a_stopped_one_is_better_than_none(file_store: ObstoreStore) -> None:
    spec = _spec(file_store)
    result = rank(spec, draw_trials(spec), {1: ENDED[1], 2: ENDED[2]}, {3: list(_metrics(0.01))})
    assert result.best is not None
    assert result.best.run == "s-1"
    assert [(one.trial, one.status) for one in result.trials] == [(3, "waiting"), (1, "stopped"), (0, "waiting"), (2, "failed")]  # fmt: skip
    nothing = rank(spec, draw_trials(spec), {}, {})
    assert (nothing.best_spec, nothing.num_waiting, nothing.is_complete) == (None, 4, False)


def test_a_search_is_complete_unless_it_was_interrupted_before_its_time(file_store: ObstoreStore) -> None:
    spec, some = _spec(file_store), {0: ENDED[0], 1: ENDED[1]}
    assert rank(spec, draw_trials(spec), ENDED, {}).is_complete
    assert not rank(spec, draw_trials(spec), some, {}).is_complete
    assert rank(_spec(file_store, time_limit_s=9), draw_trials(spec), some, {}).is_complete
    assert not rank(spec, draw_trials(spec), {2: ENDED[2]}, {}).is_complete


def test_a_search_whose_trials_have_all_ended_is_reported_without_a_cluster(file_store: ObstoreStore) -> None:
    spec, log = _spec(file_store, trials=2), SearchLog(file_store, "s")
    log.begin(spec)
    log.record(0, ENDED[0])
    log.record(1, ENDED[1])
    result = run_search(spec, resume=True)
    assert result == rank(spec, draw_trials(spec), {0: ENDED[0], 1: ENDED[1]}, {})
