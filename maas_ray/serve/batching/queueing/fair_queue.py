"""Fair queue: orders the waiting requests by tenant, priority and deadline, and selects the next batch.

    tenant       the one that has received least (fairness.py)
    request      priority 1 before 2 before …, 0 last; within a priority the earliest deadline; then order of arrival
    batch        requests of equal dtypes and sizes beyond the batch dimension, taken in the same order
    batch size   as many rows as fit, unless such a run would end after the earliest deadline (batch_size.py)

A priority counts only among the requests of one tenant, so no tenant can overtake another by raising its priorities.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from maas_ray.errors import Overloaded
from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.queueing.batch_size import HEADROOM, is_too_much, largest_on_time
from maas_ray.serve.batching.queueing.fairness import Shares, Tenant, furthest_behind
from maas_ray.serve.batching.queueing.priority_heap import PriorityHeap
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget

Key = tuple[object, ...]
"""Properties that requests must have in common to share a run: dtypes, and sizes beyond the batch dimension."""
EstimateByKey = Callable[[int, Key], float]
"""Maps the rows of a run and the key of its requests to the expected seconds; infinity if unknown."""
_TICK_S = 0.0005
"""A loop's clock may have a resolution of milliseconds: a wait that is this close to its end has ended."""


class Group:
    """Waiting items that may share a run, in one lane per tenant."""

    __slots__ = ("go_at", "key", "lines", "num_rows")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.lines: dict[Tenant, Lane] = {}
        self.num_rows = 0
        self.go_at = math.inf
        """Time at which it stops waiting for more items; maintained only if runs are delayed."""

    def __iter__(self) -> Iterator[Item]:
        return (item for line in self.lines.values() for item in line)


class Lane(PriorityHeap[Item]):
    """Waiting items of one tenant that may share a run."""

    __slots__ = ("group", "tenant")

    def __init__(self, group: Group, tenant: Tenant) -> None:
        super().__init__()
        self.group = group
        self.tenant = tenant


class FairQueue:
    """Waiting items, by tenant and by key.

    Adding and removing an item takes constant time if items arrive in order (they do with one priority and equal
    timeouts), otherwise logarithmic time. Selecting a run takes time proportional to the number of tenants plus the
    items in the run, unless a deadline is near.

    Args:
        spec: sizes and limits.
        budget: byte budget shared with the other queues of the replica.
        name: name of the model version, for messages.
        estimate_s: expected seconds of a run; infinity if unknown.
        drop: called with an item that was removed in favor of a tenant with fewer, and with the reason.
        retry_after_s: returns the seconds after which a refused request may be retried.
        weights: weights of tenants other than 1; rows run while several tenants wait are in proportion.
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
        self.max_rows = spec.max_batch_size
        """Maximum rows of one batch; may be changed at any time."""
        self._max_items = spec.max_queued_requests
        self._delay_s = spec.max_delay_ms / 1000
        self._groups: dict[Key, Group] = {}
        self._tenants: dict[str, Tenant] = {}
        # The last tenant and the last group are kept when they become empty: single requests often follow each other.
        self._orders: dict[Tenant, PriorityHeap[Item]] | None = None
        """All items of each tenant over all groups; maintained from the second group on until the queue is empty."""
        self._shares = Shares(weights or {})
        self.earliest = math.inf
        """Lower bound of the deadlines in the queue."""
        self._count = 0
        self.num_items = 0
        self.num_rows = 0

    @property
    def num_tenants(self) -> int:
        """Number of tenants with waiting items, including the last one if the queue is empty."""
        return len(self._tenants)

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[Item]:
        return (item for group in self._groups.values() for item in group)

    def by_key(self) -> Iterator[tuple[Key, int, int]]:
        """Yields each key with the waiting rows and requests that have it in common."""
        for group in self._groups.values():
            if group.num_rows:
                yield group.key, group.num_rows, sum(line.num_waiting for line in group.lines.values())

    def add(self, item: Item, key: Key, tenant_name: str, now: float) -> None:
        """Adds an item; there must be room for it.

        Args:
            item: not waiting yet.
            key: key of its group.
            tenant_name: name of its tenant.
            now: current time on the loop's clock.
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
        """Removes and returns the items of the next run; empty if nothing waits, or all may wait for more.

        Args:
            can_merge: whether requests may share a run at all.
            now: current time on the loop's clock.
            can_wait: whether a group may wait for more items (`BatchSpec.max_delay_ms`).
        """
        if not self.num_items:
            return []
        groups: list[Group] | None = None
        if self._delay_s and can_wait and can_merge:
            groups = [g for g in self._groups.values() if g.num_rows >= self.max_rows or g.go_at <= now + _TICK_S]
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
        """Returns the time at which the first group stops waiting for more items."""
        return min((group.go_at for group in self._groups.values()), default=math.inf)

    def remove(self, item: Item) -> None:
        """Removes an item if it is still waiting, and releases its bytes immediately."""
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
        """Subtracts items of one lane that no longer wait from all counters."""
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
        """Returns the item that must be in the next run: the first of the tenant whose turn it is."""
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
        """Returns the lanes for a run that contains `head`, the maximum rows, and whether deadlines limit it further.

        Usually all lanes qualify, since a full run ends long before the earliest deadline. Otherwise items that would
        be late even alone are skipped until they expire or nothing else waits. If the tenant's waiting items would be
        late even in consecutive full runs, small runs for the earliest deadlines would make still more of them late:
        then the run is the largest one with all items on time, and items with earlier deadlines are skipped as well.
        """
        lane: Lane = head.lane
        group, most = lane.group, self.max_rows

        def estimate_s(num_rows: int) -> float:
            return self._estimate_s(num_rows, group.key)

        run_s = HEADROOM * estimate_s(min(most, group.num_rows))
        if now + run_s <= self.earliest or math.isinf(run_s):
            return group.lines, most, False
        self.earliest = min(item.deadline for item in self)  # the bound may be that of a removed item
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
        """Removes and returns the first items of one tenant, up to the rows of a run, but at least one item."""
        batch: list[Item] = []
        most, num_rows, num_bytes = self.max_rows, 0, 0
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
        """Removes and returns items in the tenants' turns, as many rows as end before their earliest deadline.

        Args:
            lines: lanes to take from.
            most: maximum rows, unless a single item has more.
            now: start time of the run; minus infinity if no deadline is near.
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
        """Returns when an item stops waiting for others: after the delay, or sooner if its deadline is near."""
        run_s = HEADROOM * self._estimate_s(self.max_rows, item.lane.group.key)
        return min(item.queued_at + self._delay_s, item.deadline - (run_s if math.isfinite(run_s) else 0.0))

    def make_room(self, item: Item, tenant_name: str) -> None:
        """Drops items of tenants above their share so that a tenant below its share has room; for a full queue.

        Raises:
            Overloaded: no tenant has more than its share; nothing was dropped.
        """
        budget = self._budget
        too_many = self.num_items >= self._max_items
        too_large = budget.used + item.num_bytes > budget.limit
        mine = self._tenants.get(tenant_name) or Tenant(tenant_name, self._shares.weight(tenant_name))
        most = max(self._tenants.values(), key=lambda each: each.num_items / each.weight, default=mine)
        if too_many and most.num_items / most.weight <= (mine.num_items + 1) / mine.weight:
            raise Overloaded(
                f"the queue of {self._name} is full: {self.num_items} requests wait, the limit is "
                f"{self._max_items}; retry later",
                self._retry_after_s(),
            )
        largest = max(self._tenants.values(), key=lambda each: each.num_bytes / each.weight, default=mine)
        if too_large and (
            largest.num_bytes / largest.weight <= (mine.num_bytes + item.num_bytes) / mine.weight
            or budget.used - largest.num_bytes + item.num_bytes > budget.limit
        ):
            raise Overloaded(
                f"the queue of this replica is full: {budget.used} bytes wait, this request has {item.num_bytes}, "
                f"the limit is {budget.limit}; retry later, or send a smaller request",
                self._retry_after_s(),
            )
        dropped = [self._remove_last(most)] if too_many else []
        while budget.used + item.num_bytes > budget.limit:
            dropped.append(self._remove_last(largest))
        for loser in dropped:
            text = f"the queue of {self._name} is full, mostly with your requests, so a request of another tenant"
            self._drop(loser, Overloaded(f"{text} took the place of this one; retry later", self._retry_after_s()))

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
