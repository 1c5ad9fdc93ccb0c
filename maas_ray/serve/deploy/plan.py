"""Deployment plan of a pool, made before anything starts: required resources, free resources, and rollout steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from maas_ray.cluster.capacity.nodes import Node
from maas_ray.errors import ResourcesMissing
from maas_ray.serve.deploy.binding import version_of
from maas_ray.serve.deploy.room import FreeResources, can_replace, needs_of, say_free, say_needs
from maas_ray.serve.deploy.standing import Standing
from maas_ray.serve.deploy.way import Way
from maas_ray.serve.spec.pools import ApplicationSpec, PoolSpec, ReplicaRange


class NoRoomNow(ResourcesMissing):
    """The cluster is large enough, but other workloads use the resources."""


@dataclass(frozen=True)
class UpdatePlan:
    """How one pool is deployed."""

    pool: str
    needed: str
    """Resources of the new replicas, in addition to those in use."""
    free: str
    """Free resources of the nodes that the pool may use."""
    way: Way
    what: str
    """`first start`, `update`, `scaling`, or `nothing changes`."""
    num_new: int
    """Number of replicas to start."""
    is_at_once: bool
    """Whether all new replicas fit in addition to everything that runs."""

    def __str__(self) -> str:
        how = f": {self.way.describe()}" if self.what == "update" else ""
        return f"pool {self.pool!r}: {self.what}, needs {self.needed}, free: {self.free}{how}"


def plan(
    pool: PoolSpec, spec: ApplicationSpec, standing: Standing | None, nodes: Sequence[Node], may_grow: bool = False
) -> UpdatePlan:
    """Returns the plan of one pool.

    Args:
        pool: wanted pool.
        spec: the same pool, as its replicas receive it.
        standing: current state of the pool; None: it does not exist.
        nodes: nodes of the cluster with their free resources.
        may_grow: whether an autoscaler may add nodes for the whole pool.

    Raises:
        NoRoomNow: it would fit if other workloads used less.
        ResourcesMissing: it can never fit, or only with a downtime that the spec does not allow.
    """
    needs, nodes = needs_of(spec), [node for node in nodes if node.has_labels(spec.placement.labels)]
    old = [replica.node for replica in standing.running if replica.node] if standing is not None else []
    old_spec = standing.spec if standing is not None else None
    same = standing is not None and standing.version == version_of(spec)
    num = _number(spec, len(old))
    missing = max(0, num - len(old)) if same else num
    what = "first start" if not old else "update" if not same else "scaling" if missing else "nothing changes"
    one_per_node = spec.placement.strategy == "one_per_node"
    room = FreeResources({node.id: dict(node.free) for node in nodes}, one_per_node, list(old))
    needed = f"{missing} × {say_needs(needs)}"
    free = say_free(nodes, needs)

    def found(way: Way, is_at_once: bool) -> UpdatePlan:
        return UpdatePlan(pool.name, needed, free, way, what, missing, is_at_once)

    at_once = Way(max(1, num), max(1, num))
    if may_grow or room.copy().place(needs, missing) >= missing > 0:
        return found(at_once, not may_grow)
    if missing == 0:
        _check_ever(pool, spec, nodes, 1)
        return found(at_once, True)
    _check_ever(pool, spec, nodes, num)
    if what == "update":
        old_needs = needs_of(old_spec) if old_spec is not None else needs
        way = _way(room, old, old_needs, needs, num)
        if way is None:
            raise NoRoomNow(_no_room(pool, needed, free, "even if the old replicas end; other workloads use the rest"))
        if way.is_away and not pool.rollout.allow_downtime:
            raise ResourcesMissing(
                f"pool {pool.name!r} cannot be updated without downtime: {needed} fit neither in addition to the "
                f"{len(old)} running replica{'' if len(old) == 1 else 's'} (free: {free}) nor in steps; add nodes, "
                "or accept the downtime with rollout.allow_downtime: true"
            )
        return found(way, False)
    raise NoRoomNow(_no_room(pool, needed, free, "other workloads use the rest (`ray status`)"))


def _way(
    room: FreeResources, old: Sequence[str], old_needs: dict[str, float], needs: dict[str, float], num: int
) -> Way | None:
    """Returns the way that loses least capacity; None if the new replicas do not fit even without the old ones."""
    first = min(num - 1, room.copy().place(needs, num))
    if first > 0 and can_replace(room, old, old_needs, needs, num, first):
        return Way(first, num)
    if num > 1 and len(old) > 1 and can_replace(room, old, old_needs, needs, num, 0):
        return Way(0, num)
    empty = room.copy()
    for node in old:
        empty.release(node, old_needs)
    return Way(0, num, is_away=True) if empty.place(needs, num) == num else None


def _number(spec: ApplicationSpec, num_old: int) -> int:
    """Returns the number of replicas that Serve starts: for a range the running ones, within its bounds."""
    wanted = spec.replicas
    return min(max(num_old, wanted.min), wanted.max) if isinstance(wanted, ReplicaRange) else wanted


def _check_ever(pool: PoolSpec, spec: ApplicationSpec, nodes: Sequence[Node], num: int) -> None:
    """Raises an error for a pool that would not fit even on an empty cluster."""
    needs = needs_of(spec)
    whole = FreeResources({node.id: dict(node.total) for node in nodes}, spec.placement.strategy == "one_per_node")
    fitted = whole.place(needs, num)
    if fitted >= num:
        return
    labels = f" with the labels {dict(spec.placement.labels)}" if spec.placement.labels else ""
    total = say_free([Node(node.id, node.address, node.total, node.total, node.labels) for node in nodes], needs)
    rule = ", one per node" if spec.placement.strategy == "one_per_node" else ""
    raise ResourcesMissing(
        f"pool {pool.name!r} can never run on this cluster: it needs {num} × {say_needs(needs)}{rule}, but only "
        f"{fitted} fit on its {len(nodes)} nodes{labels}, even without other workloads (total: {total}); lower "
        "replicas or resources, change placement, or add nodes"
    )


def _no_room(pool: PoolSpec, needed: str, free: str, why: str) -> str:
    return (
        f"not enough free resources for pool {pool.name!r}: it needs {needed}, free: {free}; {why}: wait, end other "
        "workloads, add nodes, or set rollout.preempt_training to preempt training runs"
    )
