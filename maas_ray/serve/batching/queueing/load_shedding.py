"""Load shedding: which waiting requests a full queue drops for a new one, and which new ones it refuses."""

from collections.abc import Callable

from maas_ray.errors import Overloaded
from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.queueing.fairness import Tenant
from maas_ray.serve.batching.queueing.waiting_items import WaitingItems


class LoadShedding:
    """The limits of a queue, and what happens at them.

    Args:
        max_items: maximum number of waiting items.
        name: name of the model version, for messages.
        drop: called with an item that was removed in favor of a tenant with fewer, and with the reason.
        retry_after_s: returns the seconds after which a refused request may be retried.
    """

    def __init__(
        self,
        max_items: int,
        name: str,
        drop: Callable[[Item, Overloaded], None],
        retry_after_s: Callable[[], float],
    ) -> None:
        self.max_items = max_items
        self._name = name
        self._drop = drop
        self._retry_after_s = retry_after_s

    def make_room(self, waiting: WaitingItems, item: Item, tenant_name: str) -> None:
        """Drops items of tenants above their share so that a tenant below its share has room; for a full queue.

        Args:
            waiting: the items of the queue.
            item: the item that needs room.
            tenant_name: name of its tenant.

        Raises:
            Overloaded: no tenant has more than its share; nothing was dropped.
        """
        budget, tenants = waiting.budget, waiting.tenants
        too_many = waiting.num_items >= self.max_items
        too_large = budget.used + item.num_bytes > budget.limit
        mine = tenants.get(tenant_name) or Tenant(tenant_name, waiting.shares.weight(tenant_name))
        most = max(tenants.values(), key=lambda each: each.num_items / each.weight, default=mine)
        if too_many and most.num_items / most.weight <= (mine.num_items + 1) / mine.weight:
            raise Overloaded(
                f"the queue of {self._name} is full: {waiting.num_items} requests wait, the limit is "
                f"{self.max_items}; retry later",
                self._retry_after_s(),
            )
        largest = max(tenants.values(), key=lambda each: each.num_bytes / each.weight, default=mine)
        if too_large and (
            largest.num_bytes / largest.weight <= (mine.num_bytes + item.num_bytes) / mine.weight
            or budget.used - largest.num_bytes + item.num_bytes > budget.limit
        ):
            raise Overloaded(
                f"the queue of this replica is full: {budget.used} bytes wait, this request has {item.num_bytes}, "
                f"the limit is {budget.limit}; retry later, or send a smaller request",
                self._retry_after_s(),
            )
        dropped = [waiting.remove_last(most)] if too_many else []
        while budget.used + item.num_bytes > budget.limit:
            dropped.append(waiting.remove_last(largest))
        for loser in dropped:
            text = f"the queue of {self._name} is full, mostly with your requests, so a request of another tenant"
            self._drop(loser, Overloaded(f"{text} took the place of this one; retry later", self._retry_after_s()))
