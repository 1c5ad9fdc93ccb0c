"""Which of several ranks' errors a run is said to have ended with."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from maas_ray.errors import DataError, MaasError, RanksMissing, ResourcesMissing, SaveFailed, TrainingFailed
from maas_ray.store.objects import StorageSpec
from maas_ray.train.ranks.failure_causes import explain, has_waited_out, recurs
from maas_ray.train.ranks.rank_registry import GroupAttempt
from maas_ray.train.ranks.run_actor import Launch

JOB = Launch(
    run="r",
    name="r-1",
    spec="{}",
    data_digest="",
    storage=StorageSpec(),
    sizes=(2,),
    together=1,
    cpus=1,
    gpus=0,
    max_restarts=3,
    timeout_s=45.0,
    placement_timeout_s=60.0,
    scale_up_interval_s=30.0,
)
CLOSED = RuntimeError("Connection closed by peer [127.0.0.1]:1")
DIED = WorkerHealthCheckFailedError("a worker health check failed", failure=ActorDiedError())
LATE = RuntimeError("[unbound_buffer.cc:81] Timed out waiting 45000ms for recv operation to complete")
LOST = SaveFailed("rank 0 lost another rank while saving")


@pytest.mark.parametrize(
    ("failures", "kind", "named"),
    [
        ({0: CLOSED, 1: DIED}, TrainingFailed, "rank 1: ActorDiedError"),
        ({0: LOST, 1: DIED}, TrainingFailed, "rank 1: ActorDiedError"),
        ({0: LATE, 1: RanksMissing("rank 1 is missing: silent")}, RanksMissing, "rank 1 is missing"),
        ({0: CLOSED, 1: DataError("a planted row")}, DataError, "a planted row"),
        ({0: CLOSED, 1: KeyError("planted")}, TrainingFailed, "rank 1: KeyError: 'planted'"),
    ],
)
def test_the_first_cause_of_several_errors_is_reported(
    failures: dict[int, Exception], kind: type[MaasError], named: str
) -> None:
    error = explain(JOB, WorkerGroupError("planted", failures))
    assert type(error) is kind
    assert named in str(error)


def test_an_error_of_the_controller_is_reported_unchanged() -> None:
    cause = ResourcesMissing("no room")
    assert explain(JOB, ControllerError(cause)) is cause
    assert "planted" in str(explain(JOB, ControllerError(OSError("planted"))))


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (LATE, True),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL"), True),
        (CLOSED, False),
        (OSError("the read operation timed out"), False),
        (None, False),
    ],
)
def test_only_a_rank_that_timed_out_waiting_reports_a_missing_one(error: Exception | None, is_so: bool) -> None:
    assert has_waited_out(error) is is_so


@pytest.mark.parametrize(
    ("error", "steps", "reasons", "is_final"),
    [
        (ValueError("planted"), (7, 7), ("rank 0: planted",) * 2, True),
        (ValueError("planted"), (None, None), ("rank 0: planted",) * 2, True),
        (RuntimeError("input tensor has to be contiguous"), (0, 0), ("rank 0: input",) * 2, True),
        (ValueError("planted"), (7,), ("rank 0: planted",), False),
        (ValueError("planted"), (7, 9), ("rank 0: planted",) * 2, False),
        (ValueError("planted"), (7, 7), ("rank 0: other", "rank 0: planted"), False),
        (CLOSED, (7, 7), ("rank 0: closed",) * 2, False),
        (RuntimeError("CUDA error: an illegal memory access"), (7, 7), ("rank 0: CUDA",) * 2, False),
        (OSError("no space left on device"), (7, 7), ("rank 0: no space",) * 2, False),
        (ActorDiedError(), (7, 7), ("rank 0: died",) * 2, False),
        (SaveFailed("lost"), (7, 7), ("rank 0: lost",) * 2, False),
    ],
)
def test_an_error_of_the_code_at_one_step_is_not_tried_a_third_time(
    error: Exception, steps: tuple[int | None, ...], reasons: tuple[str, ...], is_final: bool
) -> None:
    past = [
        GroupAttempt(number=i + 1, workers=1, first_step=0, reached=step, committed=0, reason=reason)
        for i, (step, reason) in enumerate(zip(steps, reasons, strict=True))
    ]
    assert recurs(error, past) is is_final
    if is_final:
        text = str(explain(JOB, WorkerGroupError("planted", {0: error}), past))
        assert "failed twice" in text
        assert ("after step 7" if steps[-1] else "before its first step") in text
