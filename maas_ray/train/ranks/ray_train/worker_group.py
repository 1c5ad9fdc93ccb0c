"""The workers of one attempt: placed, started and joined to one process group, each within a deadline.

Ray Train waits for all of these without a timeout, or for minutes.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.placement_group import placement_group

from maas_ray.errors import RanksMissing
from maas_ray.ray_internals.train import DefaultPlacementGroupHandle, WorkerGroup, WorkerGroupCallback
from maas_ray.train.ranks import process_group
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.run_actor import Launch

START_S = 60.0
"""Timeout for placed workers to start, and again for them to import torch and to join a process group."""
_PLACE_S = 10.0
"""Timeout for the placement on resources that were free a moment ago."""
_LEAVE_S = 5.0
"""Timeout for ranks to leave the group; the resources of a dead rank are freed with its process."""


class Rendezvous(WorkerGroupCallback):  # type: ignore[misc]
    """Creates the torch process group of the workers before training, and adds them to the registry."""

    def __init__(self, job: Launch, ranks: RankRegistry) -> None:
        self._job = job
        self._ranks = ranks
        self.together = job.together

    def after_worker_group_start(self, worker_group: "RankGroup") -> None:
        workers = worker_group.get_workers()
        attempt = self._ranks.begin(
            [f"process {worker.metadata.pid} on {worker.metadata.node_ip}" for worker in workers]
        )
        found = worker_group.execute_single_async(0, process_group.free_address, workers[0].metadata.node_ip)
        address = self._gather({found: 0}, "chose no port")[0]
        joined = {}
        for rank, worker in enumerate(workers):
            place = worker.distributed_context
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(workers)),
                "LOCAL_RANK": str(place.local_rank),
                "LOCAL_WORLD_SIZE": str(place.local_world_size),
                "NODE_RANK": str(place.node_rank),
            }
            backend = "nccl" if self._job.gpus else "gloo"
            options = (address, backend, rank, len(workers), self._job.timeout_s, variables, attempt)
            joined[worker_group.execute_single_async(rank, process_group.join, *options)] = rank
        self._gather(joined, "did not join the group")
        self._ranks.joined()
        worker_group.watch()

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        ray.wait(worker_group.execute_async(process_group.leave), num_returns=len(worker_group), timeout=_LEAVE_S)

    def _gather(self, awaited: Mapping[Any, int], failing: str) -> dict[int, Any]:
        """The result of each rank. Raises as soon as one fails, and reports those that take longer than `START_S`."""
        deadline, answers, open_refs = time.monotonic() + START_S, {}, list(awaited)
        while open_refs:
            done, open_refs = ray.wait(open_refs, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = {
                    awaited[ref]: RanksMissing(
                        f"rank {awaited[ref]} {failing} within {START_S:g} s ({self._ranks.describe(awaited[ref])})"
                    )
                    for ref in open_refs
                }
                raise WorkerGroupError("; ".join(map(str, late.values())), late)
            answers.update({awaited[ref]: ray.get(ref) for ref in done})
        return answers


class RankGroup(WorkerGroup):  # type: ignore[misc]
    """Places workers that must share a node on one, and aborts a start that takes too long."""

    def __init__(self, *context: Any, **options: Any) -> None:
        super().__init__(*context, **options)
        self._together = next(one.together for one in self._callbacks if isinstance(one, Rendezvous))
        self._worker_group_start_timeout_s = _PLACE_S
        self._placed: Any = None
        self._too_slow: threading.Timer | None = None

    def watch(self) -> None:
        """Aborts the start unless it ends, or this is called again, within `START_S`."""
        self._unwatch()
        self._too_slow = threading.Timer(
            START_S, self._placed.shutdown
        )  # ends the workers, and with them every wait for one
        self._too_slow.daemon = True
        self._too_slow.start()

    def _unwatch(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        return dict(custom_runtime_env)  # without the variables that every process of the cluster already has

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self.has_started():  # Ray Train would leave the workers running and their resources reserved
                self._worker_group_state.shutdown()
                self._clear_state()
            raise
        finally:
            self._unwatch()

    def _create_placement_group(self, scaling_config: ScalingConfig, context: Any) -> Any:
        # Ray reserves resources worker by worker, and may place three on one node and the fourth on another. Workers
        # that must share a node are reserved as one bundle, which is always on one node.
        room = {name: amount * self._together for name, amount in context.resources_per_worker.items()}
        bundles = [room] * (context.num_workers // self._together)
        self._placed = DefaultPlacementGroupHandle(placement_group(bundles, strategy=context.placement_strategy))
        return self._placed

    def _create_workers(self, num_workers: int, *context: Any, **options: Any) -> Any:
        self.watch()
        # Ranks are ordered by node, so that the workers of one bundle get adjacent ranks, as in the mesh.
        pieces = [worker // self._together for worker in range(num_workers)]
        return super()._create_workers(num_workers, *context, **{**options, "placement_group_bundle_indices": pieces})

    def _init_train_context_on_workers(self, *context: Any) -> None:
        super()._init_train_context_on_workers(*context)
        self._unwatch()  # from here on `Rendezvous` has the timeouts
