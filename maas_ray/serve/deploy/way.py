"""Replacement of old replicas by a new version: step sizes in Serve's options. Independent of Ray."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """How many replicas change at a time."""

    num_first: int
    """New replicas that start before an old one ends; 0: an old one ends first."""
    num_replicas: int
    """Number of replicas of the pool."""
    is_away: bool = False
    """Whether all old replicas end before the first new one starts."""

    @property
    def surge_percent(self) -> int:
        """Serve's `max_surge_percent`, which Serve rounds up to whole replicas."""
        return min(100, 100 * self.num_first // self.num_replicas)

    @property
    def step(self) -> float:
        """Serve's `rolling_update_percentage`: share of the replicas that end in one step, at least one."""
        if self.is_away:
            return 1.0
        # Serve rounds down, and then uses at least one: half of a replica means one at a time.
        return min(1.0, max(0.5, self.num_first + 0.5) / self.num_replicas)

    def describe(self) -> str:
        """Returns the effect on the pool's capacity as text."""
        if self.is_away:
            return "all old replicas end first: the pool is down until a new one is ready (rollout.allow_downtime)"
        if self.num_first >= self.num_replicas:
            return "all new replicas start first; no loss of capacity"
        if self.num_first:
            return f"{self.num_first} at a time, the new ones first; no loss of capacity"
        return f"one at a time: 1 of {self.num_replicas} replicas is unavailable at a time"


FIRST_START = Way(num_first=1, num_replicas=1)
"""All new replicas first: the way if nothing is known of the free resources, and 100 percent of any number."""
