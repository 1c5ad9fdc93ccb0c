"""From a version in the store to one in memory that answers, and back. Decides neither what is loaded nor what goes."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TypeVar

from maas_ray.bundle.engine.memory import large_blocks_apart, return_to_system
from maas_ray.bundle.format import Bundle, BundleInfo, graph_size, load_bundle
from maas_ray.bundle.loading import AnyEngine, load_engine
from maas_ray.bundle.nature import Nature
from maas_ray.errors import BundleError, ConfinedError, MaasError, StoreUnavailable
from maas_ray.registry.models import Version
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.models.loaded import Loaded, memory_of, name_of
from maas_ray.serve.models.public_errors import for_callers, original
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.serve.telemetry.stats import ReplicaStats
from maas_ray.store.objects import ObjectStore

T = TypeVar("T")
V = TypeVar("V")
Key = tuple[str, int]
"""Model and version."""
_Read = tuple[BundleInfo, AnyEngine, int]

TRIM_AFTER_BYTES = 16 << 20
"""Memory is given back to the system after this much was freed: doing it takes up to 10 ms."""
TRIM_DELAY_S = 0.01
"""Whoever unloads a model still refers to it."""

FIRST_LOAD_S = 60.0
FIRST_LOAD_BYTES_PER_S = 4 << 20
"""A version's first load, in its process, may take this long and a second for so many bytes; a session is made at some
100 MB/s."""
RETRY_REFUSED_S = 600.0
"""A version whose load hung or killed its process is tried again after this time: each time takes a load's thread."""
MAX_REMEMBERED = 10_000
"""Bundles whose first load is remembered."""


class ModelLoader:
    """Threads that load; everything else happens on the loop. One load of a version at a time.

    Args:
        store: where the bundles lie.
        spec: how models are run and batched, and how long a load may take.
        stats: where loads are counted.
        budget: bytes that may wait, shared by all queues of the replica.
    """

    def __init__(self, store: ObjectStore, spec: ServingSpec, stats: ReplicaStats, budget: ByteBudget) -> None:
        self._store = store
        self._spec = spec
        self._stats = stats
        self._budget = budget
        self._threads = ThreadPoolExecutor(spec.refresh.max_parallel_loads, thread_name_prefix="load")
        self._sizes: dict[str, int] = {}
        self._reading: dict[Key, asyncio.Future[_Read]] = {}
        self._natures: dict[str, Nature] = {}
        """What the first load of a bundle taught; it need not be loaded apart again."""
        self._refused: dict[str, tuple[BundleError, float]] = {}
        self._freed_bytes = 0
        self._is_closed = False

    async def size(self, version: Version) -> int:
        """What a version will count against the memory budget; reads its description only.

        Raises:
            MaasError: it cannot be read, or not in time.
        """
        known = self._sizes.get(version.bundle)
        if known is None:
            work = asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: graph_size(self._store, version.bundle)
            )
            known = memory_of(await within(name_of(version), self._spec.refresh.timeout_s, work))
            self._sizes[version.bundle] = known
        return known

    async def load(self, version: Version) -> Loaded:
        """Loads and warms a version.

        Raises:
            StoreUnavailable: not in time. The thread goes on; whoever asks next gets what it reads.
            MaasError: it does not load.
        """
        started_s = monotonic()
        key = (version.model, version.version)
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._read(version.bundle))
            self._reading[key] = reading
            reading.add_done_callback(lambda done: self._forget(key, done))
        info, engine, num_bytes = await within(name_of(version), self._spec.refresh.load_timeout_s, reading)
        return self._serve(version, info, engine, num_bytes, monotonic() - started_s)

    def release(self, loaded: Loaded) -> None:
        """Gives back the threads and the memory of a version that answers nobody any more."""
        loaded.runner.close()
        loaded.engine.close()
        self._freed_bytes += loaded.num_bytes
        if self._freed_bytes >= TRIM_AFTER_BYTES:
            self._freed_bytes = 0
            asyncio.get_running_loop().call_later(TRIM_DELAY_S, self._trim)

    def close(self) -> None:
        """Gives the threads back; what they are doing ends by itself."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, bundle_id: str) -> _Read:
        with large_blocks_apart():
            bundle = load_bundle(self._store, bundle_id)
            num_bytes = len(bundle.graph)
            engine = self._engine(bundle)
            # Bundles of older versions do not say which dimension is the batch; the engine has looked.
            info = bundle.info.model_copy(update={"signature": engine.signature})
            del bundle
        if num_bytes >= TRIM_AFTER_BYTES:
            return_to_system()  # loading takes several times what stays
        return info, engine, memory_of(num_bytes)

    def _engine(self, bundle: Bundle) -> AnyEngine:
        """In a load's thread. A version that killed its process or hung is not tried again for a while."""
        refused, until_s = self._refused.get(bundle.id, (None, 0.0))
        if refused is not None and monotonic() < until_s:
            raise refused
        wall_s = FIRST_LOAD_S + len(bundle.graph) / FIRST_LOAD_BYTES_PER_S
        try:
            engine, nature = load_engine(bundle, self._spec.engine, wall_s=wall_s, known=self._natures.get(bundle.id))
        except BundleError as error:
            if isinstance(error.__cause__, ConfinedError):
                _remember(self._refused, bundle.id, (error, monotonic() + RETRY_REFUSED_S))
            raise
        _remember(self._natures, bundle.id, nature)
        return engine

    def _forget(self, key: Key, done: asyncio.Future[_Read]) -> None:
        self._reading.pop(key, None)
        if not done.cancelled():
            done.exception()  # whoever asked may have gone before hearing it

    def _serve(self, version: Version, info: BundleInfo, engine: AnyEngine, num_bytes: int, load_s: float) -> Loaded:
        loop = asyncio.get_running_loop()
        runner = EngineRunner(engine, loop)
        counts = self._stats.model(version.model, version.version)
        batcher = Batcher(
            runner,
            self._spec.batching,
            loop,
            can_merge=engine.can_merge and not counts.mixes,
            padding=engine.padding,
            optional=frozenset(tensor.name for tensor in info.signature.inputs if tensor.optional),
            budget=self._budget,
            name=name_of(version),
            stats=counts,
        )
        batcher.problem = counts.mixes
        stats = self._stats.loaded(version.model, version.version, load_s, lambda: batcher.num_queued)
        limit = self._spec.limits.max_answer_bytes
        return Loaded(version, info, batcher, runner, engine, stats, limit, num_bytes)

    def _trim(self) -> None:
        if not self._is_closed:
            self._threads.submit(return_to_system)


async def within(what: str, timeout_s: float, pending: asyncio.Future[T]) -> T:
    """Bounded wait for a thread; work that is late goes on there.

    Raises:
        StoreUnavailable: it has not ended in time.
        MaasError: it failed; an error of the store or the registry as callers may read it.
    """
    done, _ = await asyncio.wait({pending}, timeout=timeout_s)
    if not done:
        raise StoreUnavailable(f"the store did not give {what} within {timeout_s:g} s")
    try:
        return pending.result()
    except MaasError as error:
        raise for_callers(error, what) from original(error)


def _remember(table: dict[str, V], bundle_id: str, value: V) -> None:
    table[bundle_id] = value
    if len(table) > MAX_REMEMBERED:
        table.pop(next(iter(table)), None)
