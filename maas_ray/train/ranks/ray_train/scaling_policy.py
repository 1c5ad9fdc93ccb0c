"""The number of a run's workers, and when it changes.

Replaces Ray Train's elastic policy, which ignores complete replicas of a model and resources in use by others, ends a
group in the middle of a step, and retries a start forever.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.train import ScalingConfig

from maas_ray.cluster.capacity.claims import claimed
from maas_ray.cluster.capacity.preflight import has_autoscaler
from maas_ray.display import get_logger
from maas_ray.errors import ResourcesMissing
from maas_ray.ray_internals.nodes import draining_nodes
from maas_ray.ray_internals.train import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from maas_ray.train.ranks.capacity import find_room, round_down
from maas_ray.train.ranks.failure_causes import preempted
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.run_actor import Launch

RELEASE = ResizeDecision(num_workers=0, resources_per_worker={})
"""Ends a group that has left before the next one has resources: a draining node ends once its workers have ended."""
_SETTLE_S = 2.0
"""Time for the resources of lost workers to become free."""
_POLL_S = 0.25
_NODES_S = 1.0
"""Polling interval of the cluster's nodes."""

log = get_logger(__name__)


class ElasticScaling(ScalingPolicy):  # type: ignore[misc]
    """Decides the number of workers, and when it changes: at a committed step, or after a loss."""

    def __init__(self, job: Launch, ranks: RankRegistry, held: Callable[[], Counter[str]]) -> None:
        super().__init__(ScalingConfig(num_workers=job.sizes[-1], resources_per_worker=dict(job.resources)))
        self._job = job
        self._ranks = ranks
        self._held = held
        self._waiting_since: float | None = None
        self._looked = time.monotonic()
        self._asked_nodes = time.monotonic()
        self._has_autoscaler = False
        self._request: threading.Thread | None = None

    def _get_num_workers_for_resource_request(self) -> int:
        return self._job.sizes[-1]

    # Ray sends requests to the autoscaler through one actor of the cluster, on the node of the first driver with a
    # request. After the loss of that node each request times out after 5 s: here it only delays other requests.

    def _send_resource_request(self) -> None:
        self._has_autoscaler = has_autoscaler()
        self._maybe_send_resource_request()

    def _maybe_send_resource_request(self) -> None:
        if self._has_autoscaler and (self._request is None or not self._request.is_alive()):
            self._request = threading.Thread(target=super()._maybe_send_resource_request, daemon=True)
            self._request.start()

    def _cancel_resource_request(self) -> None:
        if self._request is not None:
            super()._cancel_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self._ranks.final is not None:
            raise preempted(self._job, self._ranks)
        self._maybe_send_resource_request()
        waited = self._waited()
        size = self._size()
        if size == self._job.sizes[-1] or (size and waited >= _SETTLE_S):
            self._looked = time.monotonic()
            return ResizeDecision(num_workers=size, resources_per_worker=dict(self._job.resources))
        if waited > self._job.placement_timeout_s:
            each = f", each {self._job.together} of them on one node," if self._job.together > 1 else ""
            raise ResourcesMissing(
                f"run {self._job.run!r}: no free resources for {self._job.sizes[0]} workers of "
                f"{dict(self._job.resources)}{each} within workers.placement_timeout_s "
                f"{self._job.placement_timeout_s:g} s; committed checkpoints are kept: continue with --resume once "
                "resources are free"
            )
        time.sleep(_POLL_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        if self._ranks.has_left:
            decision = self.make_decision_for_non_running_worker_group()
            if isinstance(decision, NoopDecision) and self._waited() >= _SETTLE_S:
                decision = RELEASE
            if isinstance(decision, ResizeDecision):
                self._ranks.end(self._ranks.asked or "")
            return decision
        self._waiting_since = None
        self._maybe_send_resource_request()
        try:
            if self._ranks.asked is None and (reason := self._reason(worker_group_state.num_workers)):
                self._ranks.ask(reason)
        except (
            ray.exceptions.RpcError
        ) as error:  # the head node is unreachable; ranks continue without it, and the request is repeated
            log.warning("the cluster's head node does not answer: %s", error)
        return NoopDecision()

    def after_claims(self, num_workers: int) -> int:
        """The number of workers to start. Waits without a timeout while serving claims resources, then for free ones.

        Called after the old workers have ended and freed their resources.
        """
        if claimed() is None:
            return num_workers
        while claimed() is not None or not (num_workers := self._size()):
            if self._ranks.final is not None:
                raise preempted(self._job, self._ranks)
            time.sleep(_POLL_S)
        self._looked = time.monotonic()
        return num_workers

    def _waited(self) -> float:
        """Seconds since the run started to wait for resources."""
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        return now - self._waiting_since

    def _size(self) -> int:
        job = self._job
        return round_down(find_room(job.resources, self._held(), job.sizes[-1], job.together), job.sizes)

    def _reason(self, num_workers: int) -> str | None:
        """The reason why the workers should restart, or None."""
        now = time.monotonic()
        if now - self._asked_nodes < _NODES_S:
            return None
        self._asked_nodes = now
        if going := draining_nodes() & self._held().keys():
            return f"node {min(going)[:12]} is draining"
        if who := claimed():
            return f"{who} claims resources"
        if num_workers < self._job.sizes[-1] and now - self._looked >= self._job.scale_up_interval_s:
            self._looked = now
            if (size := self._size()) > num_workers:
                return f"resources for {size} workers are free"
        return None
