"""Ray Train's controller of a run: with our policies, worker group and registry, it notices ranks that are missing."""

import asyncio
from collections import Counter
from typing import Any

from maas_ray.errors import RanksMissing
from maas_ray.ray_internals.train import (
    InitializingState,
    PreemptionCallback,
    ResizeDecision,
    TrainController,
    TrainControllerLoopIterationResult,
    propagated_callbacks,
)
from maas_ray.train.ranks.failure_causes import has_waited_out
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.ray_train.failure_policy import RestartPolicy
from maas_ray.train.ranks.ray_train.scaling_policy import RELEASE, ElasticScaling
from maas_ray.train.ranks.ray_train.worker_group import START_S, RankGroup
from maas_ray.train.ranks.run_actor import Launch

_SILENT_S = 30.0
"""Heartbeat timeout of a rank, unless `timeout_s` is shorter."""
_SETTLE_S = 2.0
"""Time for several ranks to report their timeouts."""


class RunController(TrainController):  # type: ignore[misc]
    """Runs the attempts of a run in the process of its actor."""

    worker_group_cls = RankGroup

    def __init__(self, job: Launch, ranks: RankRegistry, **parts: Any) -> None:
        self._job = job
        self._ranks = ranks
        self._sizes = ElasticScaling(job, ranks, self.held)
        policies = {"scaling_policy": self._sizes, "failure_policy": RestartPolicy(job, ranks)}
        super().__init__(**{**parts, **policies})
        propagated = propagated_callbacks(self)
        propagated[:] = [one for one in propagated if not isinstance(one, PreemptionCallback)]

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> Any:
        return super()._start_worker_group(self._sizes.after_claims(num_workers), resources_per_worker)

    def held(self) -> Counter[str]:
        """Number of workers of the group on each node, by its id, including dead ones."""
        found = self.get_worker_group()
        workers = found.get_workers() if found is not None and found.has_started() else []
        return Counter(worker.metadata.node_id for worker in workers)

    def _execute_resize_decision(self, decision: ResizeDecision) -> Any:
        if decision is not RELEASE:
            return super()._execute_resize_decision(decision)
        self._shutdown_worker_group()
        return TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(), previous_state=self._state, next_state=InitializingState()
        )

    async def _poll_workers(self) -> Any:
        status = await super()._poll_workers()
        if any(has_waited_out(each.error) for each in status.worker_statuses.values()):
            await asyncio.sleep(_SETTLE_S)
            status = await super()._poll_workers()
            # A rank that is still running while others timed out is the one that they waited for.
            late = [rank for rank, each in status.worker_statuses.items() if each.error is None and each.running]
            missing = {rank: f"others waited for it; {self._ranks.describe(rank)}" for rank in late}
        else:
            missing = self._ranks.silent(min(_SILENT_S, self._job.timeout_s), START_S)
        for rank, what in missing.items():
            each = status.worker_statuses[rank]
            each.error = each.error or RanksMissing(f"rank {rank} is missing: {what}")
        return status

    def _is_training_succeeded(self, status: Any) -> bool:
        return TrainController._is_training_succeeded(status) and not self._ranks.has_left
