"""Model loader: loads a version from the store into memory, and releases it. reference_loads.py and cache.py decide which."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TypeVar

from maas_ray.bundle.engine.memory import large_blocks_apart, return_to_system
from maas_ray.bundle.format import Bundle, BundleInfo, graph_size, load_bundle
from maas_ray.bundle.loading import AnyEngine, load_engine
from maas_ray.bundle.nature import Nature
from maas_ray.decoding.decoder import InputDecoder
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
_Read = tuple[BundleInfo, AnyEngine, int, InputDecoder | None]

TRIM_AFTER_BYTES = 16 << 20
"""Bytes freed after which memory is returned to the system: doing so takes up to 10 ms."""
TRIM_DELAY_S = 0.01
"""Delay before that, since the caller that unloads a model still has a reference to it."""

FIRST_LOAD_S = 60.0
FIRST_LOAD_BYTES_PER_S = 4 << 20
"""A version's first load, in its own process, may take `FIRST_LOAD_S` plus one second per this many bytes; a session is
created at some 100 MB/s."""
RETRY_REFUSED_S = 600.0
"""Seconds until a version whose load hung or killed its process is tried again: each try takes a loader thread."""
MAX_REMEMBERED = 10_000
"""Maximum number of bundles whose first load is remembered."""


class ModelLoader:
    """Threads that load versions; all other work is on the loop. A version has one load at a time.

    Args:
        store: store of the bundles.
        spec: run and batching options, and the time limit of a load.
        stats: counts loads.
        budget: limit of waiting bytes, shared by all queues of the replica.
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
        """Result of the first load of a bundle; later loads need no separate process."""
        self._refused: dict[str, tuple[BundleError, float]] = {}
        self._freed_bytes = 0
        self._is_closed = False

    async def size(self, version: Version) -> int:
        """Returns the bytes that a version will count against the memory budget; reads only its description.

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
            StoreUnavailable: the time limit passed. The thread continues; the next caller gets its result.
            MaasError: it cannot be loaded.
        """
        started_s = monotonic()
        key = (version.model, version.version)
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._read(version.bundle))
            self._reading[key] = reading
            reading.add_done_callback(lambda done: self._forget(key, done))
        info, engine, num_bytes, decoder = await within(name_of(version), self._spec.refresh.load_timeout_s, reading)
        loaded = self._serve(version, info, engine, num_bytes, monotonic() - started_s)
        loaded.decoder = decoder
        return loaded

    def release(self, loaded: Loaded) -> None:
        """Releases the threads and the memory of a version that has no more requests."""
        loaded.runner.close()
        loaded.engine.close()
        if loaded.decoder is not None:
            loaded.decoder.close()
        self._freed_bytes += loaded.num_bytes
        if self._freed_bytes >= TRIM_AFTER_BYTES:
            self._freed_bytes = 0
            asyncio.get_running_loop().call_later(TRIM_DELAY_S, self._trim)

    def close(self) -> None:
        """Releases the loader threads; their current work ends by itself."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, bundle_id: str) -> _Read:
        with large_blocks_apart():
            bundle = load_bundle(self._store, bundle_id)
            num_bytes = len(bundle.graph)
            engine = self._engine(bundle)
            decoder = self._decoder(bundle)
            # Bundles of older versions do not name the batch dimension; the engine has determined it.
            info = bundle.info.model_copy(update={"signature": engine.signature})
            del bundle
        if num_bytes >= TRIM_AFTER_BYTES:
            return_to_system()  # loading takes several times the final memory
        return info, engine, memory_of(num_bytes), decoder

    def _decoder(self, bundle: Bundle) -> InputDecoder | None:
        """The decoder of the input that takes image files or texts, if there is one; it is always the only input."""
        for tensor in bundle.info.signature.inputs:
            if tensor.encoding is None:
                continue
            max_bytes = self._spec.limits.max_body_bytes
            decoder = InputDecoder(
                tensor.name, tensor.encoding, tensor.shape[1:], bundle.tokenizer, max_bytes=max_bytes
            )
            decoder.start()
            return decoder
        return None

    def _engine(self, bundle: Bundle) -> AnyEngine:
        """Creates an engine, in a loader thread. A version that killed its process or hung is refused for some time."""
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
            done.exception()  # the caller may have left before the failure

    def _serve(self, version: Version, info: BundleInfo, engine: AnyEngine, num_bytes: int, load_s: float) -> Loaded:
        loop = asyncio.get_running_loop()
        runner = EngineRunner(engine, loop)
        counts = self._stats.model(version.model, version.version)
        batcher = Batcher(
            runner,
            self._spec.batching,
            loop,
            can_merge=engine.can_merge,
            padding=engine.padding,
            optional=frozenset(tensor.name for tensor in info.signature.inputs if tensor.optional),
            budget=self._budget,
            name=name_of(version),
            stats=counts,
            problem=counts.mixes,
        )
        stats = self._stats.loaded(version.model, version.version, load_s, lambda: batcher.num_queued)
        limit = self._spec.limits.max_answer_bytes
        return Loaded(version, info, batcher, runner, engine, stats, limit, num_bytes)

    def _trim(self) -> None:
        if not self._is_closed:
            self._threads.submit(return_to_system)


async def within(what: str, timeout_s: float, pending: asyncio.Future[T]) -> T:
    """Waits for a thread with a time limit; late work continues in the thread.

    Raises:
        StoreUnavailable: the time limit passed.
        MaasError: the work failed; errors of the store or the registry are converted for clients.
    """
    done, _ = await asyncio.wait({pending}, timeout=timeout_s)
    if not done:
        raise StoreUnavailable(f"access to {what} in the store took longer than {timeout_s:g} s; retry later")
    try:
        return pending.result()
    except MaasError as error:
        raise for_callers(error, what) from original(error)


def _remember(table: dict[str, V], bundle_id: str, value: V) -> None:
    table[bundle_id] = value
    if len(table) > MAX_REMEMBERED:
        table.pop(next(iter(table)), None)
