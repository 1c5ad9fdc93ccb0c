"""Decides, before anything starts, how a pool is deployed: what it needs, what is free, and in which way it gets there."""

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
    """The cluster is large enough, but others hold the room."""


@dataclass(frozen=True)
class UpdatePlan:
    """How one pool is deployed."""

    pool: str
    needed: str
    """What the new replicas take, beside what runs."""
    free: str
    """What is free on the nodes that the pool may use."""
    way: Way
    what: str
    """`first start`, `update`, `scaling`, or `nothing changes`."""
    num_new: int
    """Replicas that start."""
    is_at_once: bool
    """Whether all new replicas fit beside all that runs."""

    def __str__(self) -> str:
        how = f": {self.way.describe()}" if self.what == "update" else ""
        return f"pool {self.pool!r}: {self.what}, needs {self.needed}, free: {self.free}{how}"


def plan(
    pool: PoolSpec, spec: ApplicationSpec, standing: Standing | None, nodes: Sequence[Node], may_grow: bool = False
) -> UpdatePlan:
    """The way of one pool.

    Args:
        pool: what it is to be.
        spec: the same, as its replicas get it.
        standing: what it is now; None: there is none.
        nodes: the cluster's nodes, with what is free on each.
        may_grow: whether an autoscaler may add nodes for all of it.

    Raises:
        NoRoomNow: it would fit if others used less.
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
            raise NoRoomNow(_no_room(pool, needed, free, "even in the place of the old replicas; others hold the room"))
        if way.is_away and not pool.rollout.allow_downtime:
            raise ResourcesMissing(
                f"pool {pool.name!r} cannot be updated without being away: {needed} do not fit beside the "
                f"{len(old)} that run{'s' if len(old) == 1 else ''} (free: {free}), nor one after another; add room, "
                "or accept the downtime with rollout.allow_downtime: true"
            )
        return found(way, False)
    raise NoRoomNow(_no_room(pool, needed, free, "others hold the room (`ray status`)"))


def _way(
    room: FreeResources, old: Sequence[str], old_needs: dict[str, float], needs: dict[str, float], num: int
) -> Way | None:
    """The way that loses least; None where the new replicas do not fit even after all old ones have ended."""
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
    """Replicas that Serve starts: of a range those that run already, within its bounds."""
    wanted = spec.replicas
    return min(max(num_old, wanted.min), wanted.max) if isinstance(wanted, ReplicaRange) else wanted


def _check_ever(pool: PoolSpec, spec: ApplicationSpec, nodes: Sequence[Node], num: int) -> None:
    """Refuses what would not fit if nothing else ran."""
    needs = needs_of(spec)
    whole = FreeResources({node.id: dict(node.total) for node in nodes}, spec.placement.strategy == "one_per_node")
    fitted = whole.place(needs, num)
    if fitted >= num:
        return
    labels = f" with the labels {dict(spec.placement.labels)}" if spec.placement.labels else ""
    total = say_free([Node(node.id, node.address, node.total, node.total, node.labels) for node in nodes], needs)
    rule = ", one per node" if spec.placement.strategy == "one_per_node" else ""
    raise ResourcesMissing(
        f"pool {pool.name!r} can never run on this cluster: it needs {num} × {say_needs(needs)}{rule}, and {fitted} of "
        f"them fit on its {len(nodes)} nodes{labels} even if nothing else ran (they have: {total}); lower replicas or "
        "resources, change placement, or add nodes"
    )


def _no_room(pool: PoolSpec, needed: str, free: str, why: str) -> str:
    return (
        f"no room for pool {pool.name!r} now: it needs {needed}, free: {free}; {why}: wait, end something, add nodes, or "
        "set rollout.preempt_training to have training runs give way"
    )
