"""Rollout: deploys the pools of a spec, watches each until it runs, and rolls back those that fail.

If all pools fit in addition to what runs, they are deployed together. Otherwise they are deployed in sequence, so that
two pools never hold one half each of the resources that both need.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from maas_ray.cluster.capacity.nodes import Node, living_nodes
from maas_ray.cluster.capacity.preflight import autoscaler_capacity
from maas_ray.display import get_logger
from maas_ray.errors import ClusterError, MaasError, ResourcesMissing
from maas_ray.ray_internals.serve import delete_without_waiting
from maas_ray.serve.deploy.binding import application_spec, bind
from maas_ray.serve.deploy.patience import patiently
from maas_ray.serve.deploy.plan import NoRoomNow, UpdatePlan, plan
from maas_ray.serve.deploy.ready import not_ready
from maas_ray.serve.deploy.room import FreeResources, needs_of, say_free, say_needs
from maas_ray.serve.deploy.standing import Standing, read_standings
from maas_ray.serve.deploy.state import is_gone, is_running, wait
from maas_ray.serve.deploy.way import Way
from maas_ray.serve.spec.pools import ApplicationSpec, PoolSpec
from maas_ray.serve.spec.serve import ServeSpec

POLL_S = 0.25
ROOM_S = 15.0
"""Seconds until resources that were just released are free and visible."""
BACK_S = 180.0
"""Maximum seconds of waiting for a pool that was rolled back."""

log = get_logger(__name__)


@dataclass(frozen=True)
class PoolOutcome:
    """How the deployment of one pool ended."""

    pool: str
    reason: str = ""
    """Why it is not as specified; empty if it is."""
    what: str = ""
    """What was done then."""
    code: str = ClusterError.code


class Rollout:
    """One deployment of a spec.

    Args:
        spec: spec of the pools, with an absolute store.
        previous: state of each pool before the deployment, by name; None: it did not exist.
        timeout_s: overrides `rollout.timeout_s` of each pool.
        say: receives progress lines.
        claim: called with a pool that preempts training runs; see cluster/capacity/claims.py.
    """

    def __init__(
        self,
        spec: ServeSpec,
        previous: Mapping[str, Standing | None],
        timeout_s: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        claim: Callable[[PoolSpec], None] = lambda pool: None,
    ) -> None:
        self._spec = spec
        self._previous = previous
        self._timeout_s = timeout_s
        self._say = say
        self._claim = claim
        self._applications = {pool.name: application_spec(pool, spec) for pool in spec.pools}

    def run(self) -> list[PoolOutcome]:
        """Deploys all pools; every wait has a time limit."""
        plans = self._together()
        if plans is not None:
            for found in plans.values():
                self._say(str(found))
            return self._deploy(self._spec.pools, plans)
        outcomes = []
        for pool in self._spec.pools:
            try:
                found = self._wait_for_room(pool)
            except MaasError as error:
                outcomes.append(PoolOutcome(pool.name, str(error), "it was not changed", error.code))
                continue
            self._say(str(found))
            outcomes += self._deploy([pool], {pool.name: found})
        return outcomes

    def _together(self) -> dict[str, UpdatePlan] | None:
        """Returns the plans of all pools if they all fit in addition to everything that runs."""
        nodes, standings, plans = living_nodes(), read_standings(), {}
        for pool in self._spec.pools:
            try:
                found = self._plan(pool, standings, nodes)
            except ResourcesMissing:
                return None
            if not found.is_at_once and len(self._spec.pools) > 1:
                return None
            plans[pool.name] = found
            nodes = _without(nodes, self._applications[pool.name], found.num_new)
        return plans

    def _plan(self, pool: PoolSpec, standings: Mapping[str, Standing], nodes: Sequence[Node]) -> UpdatePlan:
        spec = self._applications[pool.name]
        may_grow = autoscaler_capacity(needs_of(spec), spec.most_replicas) >= spec.most_replicas
        return plan(pool, spec, standings.get(pool.name), nodes, may_grow)

    def _wait_for_room(self, pool: PoolSpec) -> UpdatePlan:
        timeout_s = ROOM_S
        if pool.rollout.preempt_training:
            timeout_s = self._timeout_of(pool)
        deadline, has_claimed = time.monotonic() + timeout_s, False
        while True:
            try:
                return self._plan(pool, read_standings(), living_nodes())
            except NoRoomNow:
                if time.monotonic() > deadline:
                    raise
                if pool.rollout.preempt_training and not has_claimed:
                    self._say(f"pool {pool.name!r}: not enough free resources; preempting training runs")
                    self._claim(pool)
                    has_claimed = True
            time.sleep(2 * POLL_S)

    def _deploy(self, pools: Sequence[PoolSpec], plans: Mapping[str, UpdatePlan]) -> list[PoolOutcome]:
        before = {name: {replica.id for replica in one.running} for name, one in read_standings().items()}
        self._put([(pool, self._applications[pool.name], plans[pool.name].way) for pool in pools])
        watches = [
            Watch(pool, self._timeout_of(pool), before.get(pool.name, set()), self._missing_of(pool)) for pool in pools
        ]
        outcomes = []
        while watches:
            standings = patiently(read_standings, BACK_S)
            for watch in list(watches):
                try:
                    standing = standings.get(watch.pool.name)
                    if not patiently(lambda: watch.look(standing), BACK_S):  # noqa: B023 (called at once)
                        continue
                    outcomes.append(PoolOutcome(watch.pool.name))
                except ClusterError as error:
                    reason = f"{error}{self._missing(watch, standings.get(watch.pool.name))}"
                    self._say(f"pool {watch.pool.name!r}: {reason}; rolling it back")
                    outcomes.append(
                        PoolOutcome(watch.pool.name, reason, self._take_back(watch.pool, plans[watch.pool.name].way))
                    )
                watches.remove(watch)
            time.sleep(POLL_S)
        return outcomes

    def _put(self, wanted: Sequence[tuple[Any, ApplicationSpec, Way]]) -> None:
        targets = [
            serve.RunTarget(bind(spec, way), name=pool.name, route_prefix=pool.route_prefix)
            for pool, spec, way in wanted
        ]
        options = {"wait_for_ingress_deployment_creation": False, "wait_for_applications_running": False}
        patiently(lambda: serve.run_many(targets, **options), BACK_S)

    def _take_back(self, pool: PoolSpec, way: Way) -> str:
        """Restores the previous description of a pool; returns the result as text."""
        previous = self._previous.get(pool.name)
        try:
            if previous is None:
                delete_without_waiting(pool.name)
                wait(
                    f"the removal of pool {pool.name!r}", time.monotonic() + BACK_S, BACK_S, lambda: is_gone(pool.name)
                )
                return "the new pool was removed"
            if previous.spec is None:
                return "its previous spec is unknown, so it was not rolled back: deploy a working spec"
            num = max(1, len(previous.running))
            self._put([(previous, previous.spec, replace(way, num_first=min(way.num_first, num), num_replicas=num))])
            wait(
                f"the rollback of pool {pool.name!r}", time.monotonic() + BACK_S, BACK_S, lambda: is_running(pool.name)
            )
        except MaasError as error:
            return f"the rollback to the previous version failed: {error}"
        return "it was rolled back to the previous version"

    def _missing(self, watch: "Watch", standing: Standing | None) -> str:
        """Returns the missing resources of new replicas that no node can run."""
        waiting = [one for one in standing.replicas if one.node is None and one.state == "STARTING"] if standing else []
        if not waiting:
            return ""
        spec = self._applications[watch.pool.name]
        needs = needs_of(spec)
        nodes = [node for node in living_nodes() if node.has_labels(spec.placement.labels)]
        return f"; not enough free resources: {len(waiting)} × {say_needs(needs)} wait, free: {say_free(nodes, needs)}"

    def _missing_of(self, pool: PoolSpec) -> Callable[[], str]:
        """Returns a function with the reason why a pool is not ready, from Serve and then from the front; or empty."""
        return lambda: is_running(pool.name) or not_ready(self._spec, pool)

    def _timeout_of(self, pool: PoolSpec) -> float:
        return pool.rollout.timeout_s if self._timeout_s is None else self._timeout_s


class Watch:
    """Watches one pool until it runs as specified.

    Args:
        pool: the pool.
        timeout_s: maximum time without an additional ready replica.
        before: ids of the replicas that ran before.
        missing: returns why the pool is not ready; empty if it is.
    """

    def __init__(self, pool: PoolSpec, timeout_s: float, before: set[str], missing: Callable[[], str]) -> None:
        self.pool = pool
        self._look = missing
        self._timeout_s = timeout_s
        self._before = before
        self._num_ready = 0
        self._deadline = time.monotonic() + timeout_s

    def look(self, standing: Standing | None) -> bool:
        """Whether the pool is ready. Raises `ClusterError` if it failed, or made no progress for too long."""
        missing = self._look()
        if not missing:
            return True
        running = standing.running if standing is not None else []
        num_ready = sum(replica.id not in self._before for replica in running)
        if num_ready > self._num_ready:
            self._num_ready, self._deadline = num_ready, time.monotonic() + self._timeout_s
        if time.monotonic() > self._deadline:
            raise ClusterError(f"pool {self.pool.name!r} was not ready within {self._timeout_s:g} s: {missing}")
        return False


def _without(nodes: Sequence[Node], spec: ApplicationSpec, num: int) -> list[Node]:
    """Returns the nodes with fewer free resources, as if new replicas ran there."""
    room = FreeResources({node.id: dict(node.free) for node in nodes if node.has_labels(spec.placement.labels)})
    room.place(needs_of(spec), num)
    return [replace(node, free=room.free.get(node.id, node.free)) for node in nodes]
