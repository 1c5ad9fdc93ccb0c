"""Fair queue: orders the waiting requests by tenant, priority and deadline, and selects the next batch.

    tenant       the one that has received least (fairness.py)
    request      priority 1 before 2 before …, 0 last; within a priority the earliest deadline; then order of arrival
    batch        requests of equal dtypes and sizes beyond the batch dimension, taken in the same order
    batch size   as many rows as fit, unless such a run would end after the earliest deadline (batch_size.py)

A priority counts only among the requests of one tenant, so no tenant can overtake another by raising its priorities.
"""

import heapq
import math
from collections.abc import Callable, Mapping

from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.queueing.batch_size import HEADROOM, is_too_much, largest_on_time
from maas_ray.serve.batching.queueing.fairness import Tenant, furthest_behind
from maas_ray.serve.batching.queueing.priority_heap import PriorityHeap
from maas_ray.serve.batching.queueing.waiting_items import Group, Key, Lane, WaitingItems, heap_of
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget

EstimateByKey = Callable[[int, Key], float]
"""Maps the rows of a run and the key of its requests to the expected seconds; infinity if unknown."""
_TICK_S = 0.0005
"""A loop's clock may have a resolution of milliseconds: a wait that is this close to its end has ended."""


class FairQueue(WaitingItems):
    """Waiting items, and the selection of the next run among them.

    Selecting a run takes time proportional to the number of tenants plus the items in the run, unless a deadline is
    near.

    Args:
        spec: sizes and delay.
        budget: byte budget shared with the other queues of the replica.
        estimate_s: expected seconds of a run; infinity if unknown.
        weights: weights of tenants other than 1; rows run while several tenants wait are in proportion.
    """

    def __init__(
        self,
        spec: BatchSpec,
        budget: ByteBudget,
        estimate_s: EstimateByKey,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(budget, weights or {})
        self._estimate_s = estimate_s
        self.max_rows = spec.max_batch_size
        """Maximum rows of one batch; may be changed at any time."""
        self._delay_s = spec.max_delay_ms / 1000

    def enter(self, item: Item, key: Key, tenant_name: str, now: float) -> None:
        """Adds an item at a time on the loop's clock; see `add`."""
        self.add(item, key, tenant_name)
        if self._delay_s:
            group: Group = item.lane.group
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
            self.shares.charge(lane.tenant, head.num_rows)
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

    def _head(self, groups: list[Group] | None) -> Item:
        """Returns the item that must be in the next run: the first of the tenant whose turn it is."""
        if groups is not None:
            tenant = furthest_behind(tenant for group in groups for tenant in group.lines)
            return min((g.lines[tenant].first() for g in groups if tenant in g.lines), key=lambda item: item.rank)
        tenants = self.tenants
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
        return {tenant: heap_of(items) for tenant, items in able.items() if items}, most, True

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
        self.shares.charge(lane.tenant, num_rows)
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
            self.shares.charge(tenant, item.num_rows)
            self.remove(item)
            heapq.heapreplace(turns, (tenant.had, number, tenant, line))
        return batch

    def _must_go_at(self, item: Item) -> float:
        """Returns when an item stops waiting for others: after the delay, or sooner if its deadline is near."""
        run_s = HEADROOM * self._estimate_s(self.max_rows, item.lane.group.key)
        return min(item.queued_at + self._delay_s, item.deadline - (run_s if math.isfinite(run_s) else 0.0))
