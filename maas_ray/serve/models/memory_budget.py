"""Memory budget of a replica's models: counts the memory in use and selects idle models to evict."""

from collections.abc import Iterable
from time import monotonic

from maas_ray.errors import ModelTooLarge
from maas_ray.serve.models.loaded import Loaded

MIN_STAY_S = 0.05
"""Seconds after its last request during which a model is not idle: between finding a model and queueing a request, the
loop may run a few iterations."""


class MemoryBudget:
    """Counts the bytes of models in memory, of those being drained, and of those being loaded.

    Args:
        limit: maximum bytes; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0

    def has(self, num_bytes: int) -> bool:
        """Whether this many bytes are free."""
        return self.limit is None or self.used + num_bytes <= self.limit

    def check(self, what: str, num_bytes: int, pinned_bytes: int) -> None:
        """Raises `ModelTooLarge` if a model could not be loaded even if all others were unloaded.

        Args:
            what: name of the model, for the message.
            num_bytes: bytes that it needs.
            pinned_bytes: bytes of models that are never unloaded.
        """
        if self.limit is not None and num_bytes + pinned_bytes > self.limit:
            pinned = f", of which pinned models use {pinned_bytes}" if pinned_bytes else ""
            raise ModelTooLarge(
                f"{what} needs {num_bytes} bytes of memory, the pool's budget is {self.limit}{pinned}; "
                "raise memory_budget_bytes, or serve it in its own pool"
            )

    def victims(self, num_bytes: int, leaving_bytes: int, candidates: Iterable[Loaded]) -> list[Loaded] | None:
        """Selects the models to unload for `num_bytes`: the fewest idle ones, the least recently used first.

        Args:
            num_bytes: bytes needed.
            leaving_bytes: bytes that are already being released.
            candidates: models in memory that may be unloaded.

        Returns:
            None if the idle models do not suffice: then none should be unloaded.
        """
        chosen: list[Loaded] = []
        if self.limit is None:
            return chosen
        missing = self.used - leaving_bytes + num_bytes - self.limit
        until = monotonic() - MIN_STAY_S
        for loaded in sorted(candidates, key=lambda each: each.used_s):
            if missing <= 0 or loaded.used_s > until:
                break
            if loaded.is_idle:
                chosen.append(loaded)
                missing -= loaded.num_bytes
        return chosen if missing <= 0 else None
