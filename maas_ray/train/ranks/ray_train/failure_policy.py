"""Whether a run restarts after a failure."""

import ray
from ray.train import FailureConfig, TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError

from maas_ray.errors import MaasError
from maas_ray.ray_internals.train import (
    FailureDecision,
    FailurePolicy,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from maas_ray.train.ranks.failure_causes import find_cause, recurs
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.run_actor import Launch


class RestartPolicy(FailurePolicy):  # type: ignore[misc]
    """Restarts after a loss, up to a number of consecutive times; a new committed checkpoint resets the count.

    An error that is not transient and ends two attempts in a row after the same step ends the run.
    """

    def __init__(self, job: Launch, ranks: RankRegistry) -> None:
        super().__init__(FailureConfig(max_failures=job.max_restarts))
        self._job = job
        self._ranks = ranks
        self._losses = 0
        self._committed = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY  # others took the resources; `ElasticScaling` has the timeout
        rank, found = find_cause(training_failed_error)
        self._ranks.end(f"{'' if rank is None else f'rank {rank}: '}{str(found).partition(chr(10))[0]}")
        if isinstance(training_failed_error, ControllerError) and not isinstance(
            cause, WorkerGroupStartupFailedError | ray.exceptions.RayActorError
        ):
            return FailureDecision.RAISE
        if isinstance(found, MaasError) and not found.retryable:
            return FailureDecision.RAISE  # it would recur
        if recurs(found, self._ranks.past):
            return FailureDecision.RAISE
        if self._ranks.committed > self._committed:
            self._losses, self._committed = 0, self._ranks.committed
        self._losses += 1
        return FailureDecision.RETRY if self._losses <= self._job.max_restarts else FailureDecision.RAISE
