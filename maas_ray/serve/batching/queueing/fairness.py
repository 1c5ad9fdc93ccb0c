"""Weighted fair sharing of an engine's rows between tenants. Independent of requests and time.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): each tenant has a virtual time, which grows by rows
divided by weight with each run for it, and the tenant with the lowest virtual time is served first. A tenant that
returns after a pause starts where the others are: a pause earns no credit.
"""

from collections.abc import Iterable, Mapping

_MAX_AWAY = 1024
"""Number of tenants without a waiting request whose virtual time is remembered."""


class Tenant:
    """Waiting items and virtual time of one tenant."""

    __slots__ = ("had", "name", "num_bytes", "num_items", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.had = 0.0
        """Virtual time: rows run, divided by the weight."""
        self.num_items = 0
        self.num_bytes = 0


class Shares:
    """Tenants of one queue and their virtual times.

    Args:
        weights: weights of tenants other than 1; twice the weight is twice the rows while both have work.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._away: dict[str, float] = {}
        self._now = 0.0

    def weight(self, name: str) -> float:
        """Returns the weight of a tenant, whether it has work or not."""
        return self._weights.get(name, 1.0)

    def enter(self, name: str) -> Tenant:
        """Returns the state of a tenant that has work again."""
        tenant = Tenant(name, self.weight(name))
        tenant.had = max(self._away.pop(name, 0.0), self._now)
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """Remembers the virtual time of a tenant without work; needed only if it is ahead of the others."""
        if tenant.had > self._now:
            self._away[tenant.name] = tenant.had
            if len(self._away) > _MAX_AWAY:
                self._away = {name: had for name, had in self._away.items() if had > self._now}
            if len(self._away) > _MAX_AWAY:
                del self._away[next(iter(self._away))]

    def charge(self, tenant: Tenant, num_rows: int) -> None:
        """Adds the rows of a run to the tenant's virtual time."""
        if tenant.had > self._now:
            self._now = tenant.had
        tenant.had += num_rows / tenant.weight


def furthest_behind(tenants: Iterable[Tenant]) -> Tenant:
    """Returns the tenant with the lowest virtual time; the first of equals."""
    return min(tenants, key=lambda tenant: tenant.had)
