"""Bounded queue of one model version: stores the waiting requests and selects those of the next run.

Usually all waiting requests belong to one tenant, have one form, and fit into one run before the earliest deadline.
Then a request is appended to a list, and the list is the run. In all other cases the requests are sorted into a
`FairQueue`, which orders tenants, priorities and deadlines, until nothing waits.
"""

import math
from collections.abc import Iterator, Mapping

from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.queueing.batch_size import HEADROOM
from maas_ray.serve.batching.queueing.fair_queue import EstimateByKey, FairQueue
from maas_ray.serve.batching.queueing.load_shedding import LoadShedding
from maas_ray.serve.batching.queueing.waiting_items import Key
from maas_ray.serve.batching.spec import BatchSpec, ByteBudget

DEFAULT_TENANT = "default"


class Queue(FairQueue):
    """Waiting items within limits; see `FairQueue` for the order.

    Args:
        spec: sizes and delay.
        budget: byte budget shared with the other queues of the replica.
        estimate_s: expected seconds of a run; infinity if unknown.
        shedding: the largest number of items, and what happens at the limits.
        weights: weights of tenants other than 1; rows run while several tenants wait are in proportion.
    """

    def __init__(
        self,
        spec: BatchSpec,
        budget: ByteBudget,
        estimate_s: EstimateByKey,
        shedding: LoadShedding,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(spec, budget, estimate_s, weights)
        self._shedding = shedding
        self._max_items = shedding.max_items
        self._alike: list[Item] = []
        """All waiting items while they are alike; the fair queue is then empty."""
        self._tenant_name = ""
        self._key: Key | None = None
        """Key of the last item; None if runs are delayed, which requires the queueing time of each item."""

    def __iter__(self) -> Iterator[Item]:
        yield from self._alike
        yield from super().__iter__()

    def by_key(self) -> Iterator[tuple[Key, int, int]]:
        if self._alike:
            yield self._key or (), self.num_rows, self.num_items
        yield from super().by_key()

    def put(self, item: Item, key: Key, tenant_name: str, now: float) -> None:
        """Adds an item.

        Args:
            item: not waiting yet.
            key: properties that it must have in common with others to share a run.
            tenant_name: name of its tenant.
            now: current time on the loop's clock.

        Raises:
            Overloaded: a limit is reached; nothing was queued.
        """
        budget, num_bytes = self.budget, item.num_bytes
        if self.num_items >= self._max_items or budget.used + num_bytes > budget.limit:
            self._sort_in(now)
            self._shedding.make_room(self, item, tenant_name)
        if key == self._key and tenant_name == self._tenant_name and self.num_items == len(self._alike):
            self._alike.append(item)
            item.is_waiting = True
            self.num_items += 1
            self.num_rows += item.num_rows
            budget.used += num_bytes
            if item.deadline < self.earliest:
                self.earliest = item.deadline
            return
        self._sort_in(now)
        self.enter(item, key, tenant_name, now)
        if not self._delay_s:
            self._key, self._tenant_name = key, tenant_name

    def take(self, can_merge: bool, now: float, can_wait: bool = False) -> list[Item]:
        alike = self._alike
        if alike:
            tenant, num_rows = self.tenants.get(self._tenant_name), self.num_rows
            is_one_run = len(alike) == 1 or (
                can_merge
                and num_rows <= self.max_rows
                and now + HEADROOM * self._estimate_s(num_rows, self._key or ()) <= self.earliest
            )
            if is_one_run and tenant is not None and len(self.tenants) == 1:
                self._alike = []
                self.shares.charge(tenant, num_rows)
                self._give_back(alike)
                for item in alike:
                    item.is_waiting = False
                return alike
            self._sort_in(now)
        return super().take(can_merge, now, can_wait)

    def remove(self, item: Item) -> None:
        if item.is_waiting:
            self._sort_in(0.0)
            super().remove(item)

    def _sort_in(self, now: float) -> None:
        """Moves all items to the fair queue, where they are ordered until nothing waits."""
        if not self._alike or self._key is None:
            return
        alike, self._alike = self._alike, []
        self._give_back(alike)
        for item in alike:
            self.enter(item, self._key, self._tenant_name, now)

    def _give_back(self, alike: list[Item]) -> None:
        self.budget.used -= sum([item.num_bytes for item in alike])
        self.num_items = self.num_rows = 0
        self.earliest = math.inf
