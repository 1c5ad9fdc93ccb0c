"""The memory budget of a replica's models: what is taken, and which idle model gives way. Unloads nothing itself."""

from collections.abc import Iterable
from time import monotonic

from maas_ray.errors import ModelTooLarge
from maas_ray.serve.models.loaded import Loaded

MIN_STAY_S = 0.05
"""A model that was asked for so recently is not idle yet: between finding a model and queuing a request, the loop may
turn a few times."""


class MemoryBudget:
    """Counts bytes of models in memory, of those that are still answering, and of those that are being loaded.

    Args:
        limit: most bytes; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0

    def has(self, num_bytes: int) -> bool:
        """Whether so much is free."""
        return self.limit is None or self.used + num_bytes <= self.limit

    def check(self, what: str, num_bytes: int, pinned_bytes: int) -> None:
        """Raises `ModelTooLarge` if a model could not be loaded even with everything else unloaded.

        Args:
            what: the model, for the message.
            num_bytes: what it needs.
            pinned_bytes: what is never given back.
        """
        if self.limit is not None and num_bytes + pinned_bytes > self.limit:
            pinned = f", of which pinned models hold {pinned_bytes}" if pinned_bytes else ""
            raise ModelTooLarge(
                f"{what} needs {num_bytes} bytes of memory, the pool's budget is {self.limit}{pinned}; "
                "raise memory_budget_bytes or serve it in a pool of its own"
            )

    def victims(self, num_bytes: int, leaving_bytes: int, candidates: Iterable[Loaded]) -> list[Loaded] | None:
        """Which models to unload for `num_bytes`: the fewest idle ones, those not used for longest first.

        Args:
            num_bytes: what is needed.
            leaving_bytes: what is being given back anyway.
            candidates: models in memory that may be unloaded.

        Returns:
            None if the idle ones do not suffice: nothing should be unloaded in vain.
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
