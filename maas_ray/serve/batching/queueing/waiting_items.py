"""Waiting items of one model version by tenant and by key, and their numbers. Independent of time and of runs."""

import math
from collections.abc import Iterable, Iterator, Mapping

from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.queueing.fairness import Shares, Tenant
from maas_ray.serve.batching.queueing.priority_heap import PriorityHeap
from maas_ray.serve.batching.spec import ByteBudget

Key = tuple[object, ...]
"""Properties that requests must have in common to share a run: dtypes, and sizes beyond the batch dimension."""


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


class WaitingItems:
    """Waiting items, in a lane for each tenant and key.

    Adding and removing an item takes constant time if items arrive in order (they do with one priority and equal
    timeouts), otherwise logarithmic time.

    Args:
        budget: byte budget shared with the other queues of the replica.
        weights: weights of tenants other than 1.
    """

    def __init__(self, budget: ByteBudget, weights: Mapping[str, float]) -> None:
        self.budget = budget
        self.tenants: dict[str, Tenant] = {}
        """Tenants with waiting items by name, including the last one if nothing waits."""
        self.shares = Shares(weights)
        self._groups: dict[Key, Group] = {}
        # The last tenant and the last group are kept when they become empty: single requests often follow each other.
        self._orders: dict[Tenant, PriorityHeap[Item]] | None = None
        """All items of each tenant over all groups; maintained from the second group on until the queue is empty."""
        self.earliest = math.inf
        """Lower bound of the deadlines in the queue."""
        self._count = 0
        self.num_items = 0
        self.num_rows = 0

    @property
    def num_tenants(self) -> int:
        """Number of tenants with waiting items, including the last one if the queue is empty."""
        return len(self.tenants)

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[Item]:
        return (item for group in self._groups.values() for item in group)

    def by_key(self) -> Iterator[tuple[Key, int, int]]:
        """Yields each key with the waiting rows and requests that have it in common."""
        for group in self._groups.values():
            if group.num_rows:
                yield group.key, group.num_rows, sum(line.num_waiting for line in group.lines.values())

    def add(self, item: Item, key: Key, tenant_name: str) -> None:
        """Adds an item; there must be room for it.

        Args:
            item: not waiting yet.
            key: key of its group.
            tenant_name: name of its tenant.
        """
        group, tenant = self._groups.get(key), self.tenants.get(tenant_name)
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
        self.budget.used += item.num_bytes
        if item.deadline < self.earliest:
            self.earliest = item.deadline

    def remove(self, item: Item) -> None:
        """Removes an item if it is still waiting, and releases its bytes immediately."""
        if item.is_waiting:
            item.is_waiting = False
            self._forget(item.lane, 1, item.num_rows, item.num_bytes)

    def remove_last(self, tenant: Tenant) -> Item:
        """Removes and returns the item of a tenant that would run last; the tenant has one."""
        lines = [group.lines[tenant] for group in self._groups.values() if tenant in group.lines]
        item = max((line.last() for line in lines), key=lambda item: item.rank)
        self.remove(item)
        return item

    def _new_line(self, key: Key, tenant_name: str) -> tuple[Group, Tenant, Lane]:
        if not self.num_items:
            self._clear()
        tenant = self.tenants.get(tenant_name)
        if tenant is None:
            tenant = self.tenants[tenant_name] = self.shares.enter(tenant_name)
            if self._orders is not None:
                self._orders[tenant] = PriorityHeap()
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
            if len(self._groups) > 1 and self._orders is None:
                everybody = self.tenants.values()
                self._orders = {each: heap_of(item for item in self if item.lane.tenant is each) for each in everybody}
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
        self.budget.used -= num_bytes
        if self._orders is not None:
            self._orders[tenant].num_waiting -= num_items
        if line.num_waiting:
            return
        line.clear()
        if not self.num_items:
            self.earliest = group.go_at = math.inf
            self._orders = None
            if len(self._groups) == len(self.tenants) == 1:
                return
        del group.lines[tenant]
        if not group.lines:
            del self._groups[group.key]
        if not tenant.num_items:
            del self.tenants[tenant.name]
            self.shares.leave(tenant)
            if self._orders is not None:
                del self._orders[tenant]
        if not self.num_items:
            self._clear()

    def _clear(self) -> None:
        for tenant in self.tenants.values():
            self.shares.leave(tenant)
        self.tenants.clear()
        self._groups.clear()
        self._orders = None


def heap_of(items: Iterable[Item]) -> PriorityHeap[Item]:
    """A heap of items that wait elsewhere too."""
    heap: PriorityHeap[Item] = PriorityHeap()
    for item in sorted(items, key=lambda item: item.rank):
        heap.add(item)
    return heap
