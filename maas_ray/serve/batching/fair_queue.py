"""Waiting requests in the order in which they shall be run, whoever sent them and whatever they look like. Runs nothing.

    whose turn   the tenant that has had least (fairness.py)
    who of them  priority 1 before 2 before …, 0 last; within a priority the earliest deadline; then first come
    with whom    requests of equal dtypes and sizes beyond the batch dimension, drawn in the same order
    how many     as many rows as fit, unless such a run would end after the earliest deadline (batch_size.py)

A priority counts among the requests of one tenant: nobody overtakes another tenant by calling himself important.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from maas_ray.errors import Overloaded
from maas_ray.serve.batching.batch_size import HEADROOM, is_too_much, largest_on_time
from maas_ray.serve.batching.fairness import Shares, Tenant, furthest_behind
from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.priority_heap import PriorityHeap
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget

Key = tuple[object, ...]
"""What requests must have in common to share a run: dtypes, and sizes beyond the batch dimension."""
EstimateByKey = Callable[[int, Key], float]
"""Expected seconds of a run by its rows, and by what its requests have in common; infinity if unknown."""
_TICK_S = 0.0005
"""A loop's clock may tick in milliseconds: a wait that is this close to its end has ended."""


class Group:
    """Waiting items that may share a run: a line for each tenant that has some."""

    __slots__ = ("go_at", "key", "lines", "num_rows")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.lines: dict[Tenant, Lane] = {}
        self.num_rows = 0
        self.go_at = math.inf
        """Time when it no longer waits to be filled; kept only where runs are delayed."""

    def __iter__(self) -> Iterator[Item]:
        return (item for line in self.lines.values() for item in line)


class Lane(PriorityHeap[Item]):
    """The waiting items of one tenant that may share a run."""

    __slots__ = ("group", "tenant")

    def __init__(self, group: Group, tenant: Tenant) -> None:
        super().__init__()
        self.group = group
        self.tenant = tenant


class FairQueue:
    """Waiting items, by tenant and by what may share a run.

    Adding and removing an item takes constant time if it arrives in order (with one priority and equal timeouts it
    does), else logarithmic; a run's choice takes as long as there are tenants and items in the run, unless a deadline
    is near.

    Args:
        spec: sizes and bounds.
        budget: bytes shared with the other queues of the replica.
        name: of the model version, for messages.
        estimate_s: expected seconds of a run; infinity if unknown.
        drop: is given an item that had to leave for one of a tenant with less, and the reason.
        retry_after_s: seconds after which a refused request may come again.
        weights: of the tenants that do not weigh 1; rows run while several wait are in proportion.
    """

    def __init__(
        self,
        spec: BatchSpec,
        budget: ByteBudget,
        name: str,
        estimate_s: EstimateByKey,
        drop: Callable[[Item, Overloaded], None],
        retry_after_s: Callable[[], float],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._budget = budget
        self._name = name
        self._estimate_s = estimate_s
        self._drop = drop
        self._retry_after_s = retry_after_s
        self._max_rows = spec.max_batch_size
        self._max_items = spec.max_queued_requests
        self._delay_s = spec.max_delay_ms / 1000
        self._groups: dict[Key, Group] = {}
        self._tenants: dict[str, Tenant] = {}
        # A tenant and a group that are alone stay when they become empty: lone requests come and go.
        self._orders: dict[Tenant, PriorityHeap[Item]] | None = None
        """Everything of each tenant over all groups; kept from the second group on until the queue is empty."""
        self._shares = Shares(weights or {})
        self.earliest = math.inf
        """No deadline in the queue is earlier."""
        self._count = 0
        self.num_items = 0
        self.num_rows = 0

    def resize(self, max_rows: int) -> None:
        """Changes the most rows of one batch."""
        self._max_rows = max_rows

    @property
    def num_tenants(self) -> int:
        """Tenants that have something waiting, or had it last."""
        return len(self._tenants)

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[Item]:
        return (item for group in self._groups.values() for item in group)

    def by_key(self) -> Iterator[tuple[Key, int, int]]:
        """What waits: a key, and the rows and requests that have it in common."""
        for group in self._groups.values():
            if group.num_rows:
                yield group.key, group.num_rows, sum(line.num_waiting for line in group.lines.values())

    def add(self, item: Item, key: Key, tenant_name: str, now: float) -> None:
        """Adds an item, for which there must be room.

        Args:
            item: not waiting yet.
            key: of its group.
            tenant_name: whose it is.
            now: time of the loop's clock.
        """
        group, tenant = self._groups.get(key), self._tenants.get(tenant_name)
        line = group.lines.get(tenant) if group is not None and tenant is not None else None
        if group is None or tenant is None or line is None:
            group, tenant, line = self._new_line(key, tenant_name)
        self._count += 1
        item.rank = (item.priority or math.inf, item.deadline, self._count)
        item.lane, item.is_waiting = line, True
        line.add(item)
        if self._orders is not None:
            self._orders[tenant].add(item)
        tenant.num_items += 1
        tenant.num_bytes += item.num_bytes
        group.num_rows += item.num_rows
        self.num_items += 1
        self.num_rows += item.num_rows
        self._budget.used += item.num_bytes
        if item.deadline < self.earliest:
            self.earliest = item.deadline
        if self._delay_s:
            item.queued_at = now
            group.go_at = min(group.go_at, self._must_go_at(item))

    def take(self, can_merge: bool, now: float, can_wait: bool = False) -> list[Item]:
        """Removes and returns what the next run shall hold; nothing if nothing waits, or may wait for more.

        Args:
            can_merge: whether requests may share a run at all.
            now: time of the loop's clock.
            can_wait: whether a group may wait to be filled (`BatchSpec.max_delay_ms`).
        """
        if not self.num_items:
            return []
        groups: list[Group] | None = None
        if self._delay_s and can_wait and can_merge:
            groups = [g for g in self._groups.values() if g.num_rows >= self._max_rows or g.go_at <= now + _TICK_S]
            if not groups:
                return []
        head = self._head(groups)
        lane: Lane = head.lane
        group = lane.group
        if not can_merge or group.num_rows == head.num_rows:
            self._shares.charge(lane.tenant, head.num_rows)
            self.remove(head)
            return [head]
        lines, most, is_tight = self._fit(head, now)
        if len(lines) == 1 and not is_tight:
            batch = self._draw_in_order(lane)
        else:
            batch = self._draw_in_turns(lines, most, now if is_tight else -math.inf)
        if self._delay_s:
            group.go_at = min((self._must_go_at(item) for item in group), default=math.inf)
        return batch

    def wake_at(self) -> float:
        """Time when the first group no longer waits to be filled."""
        return min((group.go_at for group in self._groups.values()), default=math.inf)

    def remove(self, item: Item) -> None:
        """Takes one item out, if it is still there; what it held is given back at once."""
        if item.is_waiting:
            item.is_waiting = False
            self._forget(item.lane, 1, item.num_rows, item.num_bytes)

    def _new_line(self, key: Key, tenant_name: str) -> tuple[Group, Tenant, Lane]:
        if not self.num_items:
            self._clear()
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            tenant = self._tenants[tenant_name] = self._shares.enter(tenant_name)
            if self._orders is not None:
                self._orders[tenant] = PriorityHeap()
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
            if len(self._groups) > 1 and self._orders is None:
                everybody = self._tenants.values()
                self._orders = {each: _heap_of(item for item in self if item.lane.tenant is each) for each in everybody}
        line = group.lines[tenant] = Lane(group, tenant)
        return group, tenant, line

    def _forget(self, line: Lane, num_items: int, num_rows: int, num_bytes: int) -> None:
        """Gives back what items of one line held that no longer wait."""
        group, tenant = line.group, line.tenant
        line.num_waiting -= num_items
        tenant.num_items -= num_items
        tenant.num_bytes -= num_bytes
        group.num_rows -= num_rows
        self.num_items -= num_items
        self.num_rows -= num_rows
        self._budget.used -= num_bytes
        if self._orders is not None:
            self._orders[tenant].num_waiting -= num_items
        if line.num_waiting:
            return
        line.clear()
        if not self.num_items:
            self.earliest = group.go_at = math.inf
            self._orders = None
            if len(self._groups) == len(self._tenants) == 1:
                return
        del group.lines[tenant]
        if not group.lines:
            del self._groups[group.key]
        if not tenant.num_items:
            del self._tenants[tenant.name]
            self._shares.leave(tenant)
            if self._orders is not None:
                del self._orders[tenant]
        if not self.num_items:
            self._clear()

    def _clear(self) -> None:
        for tenant in self._tenants.values():
            self._shares.leave(tenant)
        self._tenants.clear()
        self._groups.clear()
        self._orders = None

    def _head(self, groups: list[Group] | None) -> Item:
        """The item that must be in the next run: the first of the tenant whose turn it is."""
        if groups is not None:
            tenant = furthest_behind(tenant for group in groups for tenant in group.lines)
            return min((g.lines[tenant].first() for g in groups if tenant in g.lines), key=lambda item: item.rank)
        tenants = self._tenants
        tenant = next(iter(tenants.values())) if len(tenants) == 1 else furthest_behind(tenants.values())
        if self._orders is not None:
            return self._orders[tenant].first()
        (group,) = self._groups.values()
        return group.lines[tenant].first()

    def _fit(self, head: Item, now: float) -> tuple[Mapping[Tenant, PriorityHeap[Item]], int, bool]:
        """What a run that holds `head` may draw from, how many rows, and whether deadlines bound it further.

        Nearly always: everything, since a full run ends long before the earliest deadline. Otherwise items that would be
        late even alone stay behind, until they expire or nothing else waits. If what the tenant has waiting would be
        late even in full runs, one after another, small runs for the sake of the earliest would lose still more: then
        the run is the largest all of whose items are on time, and those before them stay behind as well.
        """
        lane: Lane = head.lane
        group, most = lane.group, self._max_rows

        def estimate_s(num_rows: int) -> float:
            return self._estimate_s(num_rows, group.key)

        run_s = HEADROOM * estimate_s(min(most, group.num_rows))
        if now + run_s <= self.earliest or math.isinf(run_s):
            return group.lines, most, False
        self.earliest = min(item.deadline for item in self)  # the bound may have been that of an item that has left
        if now + run_s <= self.earliest:
            return group.lines, most, False
        able = {
            tenant: [item for item in line if now + estimate_s(item.num_rows) <= item.deadline]
            for tenant, line in group.lines.items()
        }
        if not any(able.values()):
            return group.lines, most, False
        if is_too_much(able[lane.tenant], most, now, estimate_s):
            everybody = [item for items in able.values() for item in items]
            most, ends_at = largest_on_time(everybody, most, now, estimate_s)
            able = {tenant: [item for item in items if item.deadline >= ends_at] for tenant, items in able.items()}
        return {tenant: _heap_of(items) for tenant, items in able.items() if items}, most, True

    def _draw_in_order(self, lane: Lane) -> list[Item]:
        """Removes and returns the first items of one tenant, as many rows as a run holds, but at least one item."""
        batch: list[Item] = []
        most, num_rows, num_bytes = self._max_rows, 0, 0
        for item in lane.drain():
            if batch and num_rows + item.num_rows > most:
                break
            item.is_waiting = False
            num_rows += item.num_rows
            num_bytes += item.num_bytes
            batch.append(item)
        self._shares.charge(lane.tenant, num_rows)
        self._forget(lane, len(batch), num_rows, num_bytes)
        return batch

    def _draw_in_turns(self, lines: Mapping[Tenant, PriorityHeap[Item]], most: int, now: float) -> list[Item]:
        """Removes and returns items in the tenants' turns, as many rows as end before the earliest of their deadlines.

        Args:
            lines: what may be drawn.
            most: rows at most, unless one item has more.
            now: time when the run starts; minus infinity if no deadline is near.
        """
        batch: list[Item] = []
        num_rows, earliest = 0, math.inf
        turns = [(tenant.had, number, tenant, line) for number, (tenant, line) in enumerate(lines.items())]
        heapq.heapify(turns)
        while turns:
            _, number, tenant, line = turns[0]
            item = next(line.drain(), None)
            if item is None:
                heapq.heappop(turns)
                continue
            more = num_rows + item.num_rows
            earliest = min(earliest, item.deadline)
            if batch and (more > most or now + HEADROOM * self._estimate_s(more, item.lane.group.key) > earliest):
                break
            num_rows = more
            batch.append(item)
            self._shares.charge(tenant, item.num_rows)
            self.remove(item)
            heapq.heapreplace(turns, (tenant.had, number, tenant, line))
        return batch

    def _must_go_at(self, item: Item) -> float:
        """When an item no longer waits for others: after the delay, or sooner if its deadline is near."""
        run_s = HEADROOM * self._estimate_s(self._max_rows, item.lane.group.key)
        return min(item.queued_at + self._delay_s, item.deadline - (run_s if math.isfinite(run_s) else 0.0))

    def make_room(self, item: Item, tenant_name: str) -> None:
        """Lets a tenant with more than its share give way to one with less; for a queue that is full.

        Raises:
            Overloaded: nobody has more; nothing was dropped.
        """
        budget = self._budget
        too_many = self.num_items >= self._max_items
        too_large = budget.used + item.num_bytes > budget.limit
        mine = self._tenants.get(tenant_name) or Tenant(tenant_name, self._shares.weight(tenant_name))
        most = max(self._tenants.values(), key=lambda each: each.num_items / each.weight, default=mine)
        if too_many and most.num_items / most.weight <= (mine.num_items + 1) / mine.weight:
            raise Overloaded(
                f"the queue of {self._name} is full: {self.num_items} requests wait, the limit is "
                f"{self._max_items}; send the request again later",
                self._retry_after_s(),
            )
        largest = max(self._tenants.values(), key=lambda each: each.num_bytes / each.weight, default=mine)
        if too_large and (
            largest.num_bytes / largest.weight <= (mine.num_bytes + item.num_bytes) / mine.weight
            or budget.used - largest.num_bytes + item.num_bytes > budget.limit
        ):
            raise Overloaded(
                f"the queue of this replica is full: {budget.used} bytes wait and this request has "
                f"{item.num_bytes}, the limit is {budget.limit}; send it again later, or a smaller one",
                self._retry_after_s(),
            )
        dropped = [self._remove_last(most)] if too_many else []
        while budget.used + item.num_bytes > budget.limit:
            dropped.append(self._remove_last(largest))
        for loser in dropped:
            text = f"the queue of {self._name} is full and most of it is yours, so a request of another tenant"
            self._drop(
                loser, Overloaded(f"{text} took the place of this one; send it again later", self._retry_after_s())
            )

    def _remove_last(self, tenant: Tenant) -> Item:
        lines = [group.lines[tenant] for group in self._groups.values() if tenant in group.lines]
        item = max((line.last() for line in lines), key=lambda item: item.rank)
        self.remove(item)
        return item


def _heap_of(items: Iterable[Item]) -> PriorityHeap[Item]:
    heap: PriorityHeap[Item] = PriorityHeap()
    for item in sorted(items, key=lambda item: item.rank):
        heap.add(item)
    return heap
