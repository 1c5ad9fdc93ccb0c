"""Whose turn it is: weighted fair sharing of an engine's rows between tenants. Knows no request and no time.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): each tenant has a virtual time, which grows by rows over
weight with everything that is run for it, and the tenant that is furthest behind comes first. One that returns after
a pause starts where the others are: a pause saves nothing up.
"""

from collections.abc import Iterable, Mapping

_MAX_AWAY = 1024
"""Tenants without a waiting request whose virtual time is remembered."""


class Tenant:
    """What one tenant has waiting, and what it has had."""

    __slots__ = ("had", "name", "num_bytes", "num_items", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.had = 0.0
        """Virtual time: rows run, divided by the weight."""
        self.num_items = 0
        self.num_bytes = 0


class Shares:
    """The tenants of one queue and what they have had.

    Args:
        weights: of the tenants that do not weigh 1; twice the weight is twice the rows while both have work.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._away: dict[str, float] = {}
        self._now = 0.0

    def weight(self, name: str) -> float:
        """Of a tenant, whether it has work or not."""
        return self._weights.get(name, 1.0)

    def enter(self, name: str) -> Tenant:
        """A tenant that has work again."""
        tenant = Tenant(name, self.weight(name))
        tenant.had = max(self._away.pop(name, 0.0), self._now)
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """Remembers what a tenant has had that has no more work; only if it is ahead of the others does it matter."""
        if tenant.had > self._now:
            self._away[tenant.name] = tenant.had
            if len(self._away) > _MAX_AWAY:
                self._away = {name: had for name, had in self._away.items() if had > self._now}
            if len(self._away) > _MAX_AWAY:
                del self._away[next(iter(self._away))]

    def charge(self, tenant: Tenant, num_rows: int) -> None:
        """Counts rows that are run for a tenant."""
        if tenant.had > self._now:
            self._now = tenant.had
        tenant.had += num_rows / tenant.weight


def furthest_behind(tenants: Iterable[Tenant]) -> Tenant:
    """The tenant whose turn it is; the first of equals."""
    return min(tenants, key=lambda tenant: tenant.had)
