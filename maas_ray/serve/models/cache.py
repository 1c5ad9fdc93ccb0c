"""The models in memory within their budget: bring one in, make idle ones give way, let old ones answer and go.

Knows no alias and no registry: who is served by what is the business of manager.py.
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
"""Pause between two looks for an idle model, while all are in use."""


class ModelCache:
    """What is in memory.

    Args:
        loader: loads and releases.
        spec: the budget, and how many loads there are at the same time.
        stats: where evictions are counted.
        is_pinned: whether a model must not give way.
        withdraw: makes requests for a model go elsewhere, and then calls `retire`.
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
        """Takes requests."""
        self.draining: set[Loaded] = set()
        """Takes none any more, but still answers some."""
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
        """What counts against the budget now."""
        return self._memory.used

    async def bring(self, version: Version, load: Load, served: int | None) -> Loaded:
        """The version, once it is in memory; two references to the same one share it.

        Args:
            version: what to bring.
            load: on whose behalf.
            served: the version of this model that it replaces; it stays until the new one is there.

        Raises:
            ModelTooLarge: it never fits.
            Overloaded: nobody wants it any more, or everything in memory stayed in use.
            MaasError: it does not load.
        """
        key = (version.model, version.version)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            if key in self.loaded:
                return self.loaded[key]
            # A swap waits for no room, so it need not wait for those who do; the loader's threads are a bound as well.
            async with self._parallel if served is None else nullcontext():
                if not load.is_wanted:
                    raise Overloaded(f"nobody waits for {name_of(version)} any more")
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
        """Lets a version answer what it has, and then releases it."""
        old = self.loaded.pop(key)
        self.draining.add(old)
        self._stats.evicted(*key)
        old.batcher.close(when_idle=lambda: self._release(old))

    def shrink(self) -> None:
        """Makes idle models give way for what a swap has taken beyond the budget."""
        self._evict(0, None)

    async def close(self, timeout_s: float) -> None:
        """Answers what waits, for at most `timeout_s`, and releases everything."""
        everything = [*self.loaded.values(), *self.draining]
        self.loaded.clear()
        await asyncio.gather(*(self._drain(loaded, timeout_s) for loaded in everything))
        self._loader.close()

    async def _make_room(self, version: Version, load: Load, served: int | None) -> int:
        """Takes what a version needs from the budget; returns it in bytes."""
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
            # A swap may go over the budget until the old version is gone: waiting would not make it smaller.
            if self._memory.has(num_bytes) or own in self.loaded:
                self._memory.used += num_bytes
                return num_bytes
            if not load.is_wanted:
                raise Overloaded(f"nobody waits for {name_of(version)} any more")
            if monotonic() > until:
                raise Overloaded(
                    f"{name_of(version)} needs {num_bytes} bytes of the pool's memory budget of {self._memory.limit}, "
                    "and every model in it is in use; send the request again later"
                )
            load.obstacle = "every model in the pool's memory budget is in use"
            await asyncio.sleep(LOOK_FOR_ROOM_S)

    def _evict(self, num_bytes: int, own: Key | None) -> None:
        candidates = [loaded for key, loaded in self.loaded.items() if key != own and not self._is_pinned(loaded)]
        leaving_bytes = sum(loaded.num_bytes for loaded in self.draining)
        for victim in self._memory.victims(num_bytes, leaving_bytes, candidates) or ():
            log.info("%s is unloaded to make room", victim.name)
            self._withdraw(victim)

    async def _drain(self, loaded: Loaded, timeout_s: float) -> None:
        idle = asyncio.Event()
        loaded.batcher.close(when_idle=idle.set)
        try:
            await asyncio.wait_for(idle.wait(), timeout_s)
        except TimeoutError:
            loaded.batcher.abort(Overloaded("the replica is being stopped; send the request again", 1.0))
        self._release(loaded)

    def _release(self, loaded: Loaded) -> None:
        if loaded.released.is_set():
            return
        self.draining.discard(loaded)
        self._loader.release(loaded)
        self._memory.used -= loaded.num_bytes
        loaded.released.set()
