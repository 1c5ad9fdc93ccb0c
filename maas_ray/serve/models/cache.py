"""Model cache: loads versions within the memory budget, evicts idle ones, and drains replaced ones.

Independent of aliases and the registry; serving_table.py decides which version serves which name.
"""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from time import monotonic
from weakref import WeakValueDictionary

from maas_ray.display import get_logger
from maas_ray.errors import Overloaded
from maas_ray.registry.models import Version
from maas_ray.serve.models.loaded import Loaded, name_of
from maas_ray.serve.models.loader import Key, ModelLoader
from maas_ray.serve.models.memory_budget import MemoryBudget
from maas_ray.serve.models.pending import Load
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.serve.telemetry.stats import ReplicaStats

log = get_logger(__name__)

LOOK_FOR_ROOM_S = 0.01
"""Seconds between two searches for an idle model while all are in use."""


class ModelCache:
    """Model versions in memory.

    Args:
        loader: loads and releases versions.
        spec: memory budget and number of concurrent loads.
        stats: counts evictions.
        is_pinned: returns whether a model must not be evicted.
        withdraw: stops sending requests to a model, and then calls `retire`.
    """

    def __init__(
        self,
        loader: ModelLoader,
        spec: ServingSpec,
        stats: ReplicaStats,
        is_pinned: Callable[[Loaded], bool],
        withdraw: Callable[[Loaded], None],
    ) -> None:
        self.loaded: dict[Key, Loaded] = {}
        """Versions that accept requests."""
        self.draining: set[Loaded] = set()
        """Versions that accept no more requests but still have responses to send."""
        self._loader = loader
        self._stats = stats
        self._is_pinned = is_pinned
        self._withdraw = withdraw
        self._load_timeout_s = spec.refresh.load_timeout_s
        self._memory = MemoryBudget(spec.memory_budget_bytes)
        self._parallel = asyncio.Semaphore(spec.refresh.max_parallel_loads)
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    @property
    def num_bytes(self) -> int:
        """Bytes currently counted against the budget."""
        return self._memory.used

    async def bring(self, version: Version, load: Load, served: int | None) -> Loaded:
        """Returns the version once it is in memory; two references to the same version share it.

        Args:
            version: version to load.
            load: load that this call is part of.
            served: number of the version that this one replaces; it serves until the new one is in memory.

        Raises:
            ModelTooLarge: it can never fit.
            Overloaded: no request waits for it any more, or all models in memory stayed in use.
            MaasError: it cannot be loaded.
        """
        key = (version.model, version.version)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            if key in self.loaded:
                return self.loaded[key]
            # A swap does not wait for room, so it need not wait for loads that do; the loader's threads limit it too.
            async with self._parallel if served is None else nullcontext():
                if not load.is_wanted:
                    raise Overloaded(f"no request waits for {name_of(version)} any more")
                num_bytes = await self._make_room(version, load, served)
                try:
                    loaded = await self._loader.load(version)
                except BaseException:
                    self._memory.used -= num_bytes
                    raise
            self._memory.used += loaded.num_bytes - num_bytes
            self.loaded[key] = loaded
            return loaded

    def retire(self, key: Key) -> None:
        """Lets a version answer its requests, and then releases it."""
        old = self.loaded.pop(key)
        self.draining.add(old)
        self._stats.evicted(*key)
        old.batcher.close(when_idle=lambda: self._release(old))

    def shrink(self) -> None:
        """Evicts idle models to compensate for what a swap took beyond the budget."""
        self._evict(0, None)

    async def close(self, timeout_s: float) -> None:
        """Answers waiting requests, for at most `timeout_s`, and releases everything."""
        everything = [*self.loaded.values(), *self.draining]
        self.loaded.clear()
        await asyncio.gather(*(self._drain(loaded, timeout_s) for loaded in everything))
        self._loader.close()

    async def _make_room(self, version: Version, load: Load, served: int | None) -> int:
        """Reserves the memory of a version in the budget; returns it in bytes."""
        if self._memory.limit is None:
            return 0
        num_bytes = await self._loader.size(version)
        own = (version.model, served) if served is not None else None
        until = monotonic() + self._load_timeout_s
        while True:
            others = [loaded for loaded in self.loaded.values() if loaded.version.model != version.model]
            pinned_bytes = sum(loaded.num_bytes for loaded in others if self._is_pinned(loaded))
            self._memory.check(name_of(version), num_bytes, pinned_bytes)
            self._evict(num_bytes, own)
            # A swap may exceed the budget until the old version is released: waiting would not make it smaller.
            if self._memory.has(num_bytes) or own in self.loaded:
                self._memory.used += num_bytes
                return num_bytes
            if not load.is_wanted:
                raise Overloaded(f"no request waits for {name_of(version)} any more")
            if monotonic() > until:
                raise Overloaded(
                    f"{name_of(version)} needs {num_bytes} bytes, the pool's memory budget is {self._memory.limit}, "
                    "and every model in memory is in use; retry later"
                )
            load.obstacle = "every model in memory is in use and the memory budget is full"
            await asyncio.sleep(LOOK_FOR_ROOM_S)

    def _evict(self, num_bytes: int, own: Key | None) -> None:
        candidates = [loaded for key, loaded in self.loaded.items() if key != own and not self._is_pinned(loaded)]
        leaving_bytes = sum(loaded.num_bytes for loaded in self.draining)
        for victim in self._memory.victims(num_bytes, leaving_bytes, candidates) or ():
            log.info("%s is evicted to free memory", victim.name)
            self._withdraw(victim)

    async def _drain(self, loaded: Loaded, timeout_s: float) -> None:
        idle = asyncio.Event()
        loaded.batcher.close(when_idle=idle.set)
        try:
            await asyncio.wait_for(idle.wait(), timeout_s)
        except TimeoutError:
            loaded.batcher.abort(Overloaded("the replica is stopping; retry", 1.0))
        self._release(loaded)

    def _release(self, loaded: Loaded) -> None:
        if loaded.released.is_set():
            return
        self.draining.discard(loaded)
        self._loader.release(loaded)
        self._memory.used -= loaded.num_bytes
        loaded.released.set()
