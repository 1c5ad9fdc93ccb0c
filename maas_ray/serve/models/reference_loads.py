"""Loads of references: load → swap → answer the waiting requests; an earlier version if the current one is broken."""

import asyncio
from collections.abc import Iterable
from time import monotonic

from maas_ray.display import get_logger
from maas_ray.errors import MaasError, NotFound, Overloaded
from maas_ray.registry.models import Version
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.models.loaded import Loaded, name_of
from maas_ray.serve.models.pending import Load, LoadDone, Waiter
from maas_ray.serve.models.public_errors import original
from maas_ray.serve.models.references import ModelReference
from maas_ray.serve.models.registry_reader import RegistryReader
from maas_ray.serve.models.serving_table import ServingTable
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.serve.telemetry.stats import ReplicaStats

log = get_logger(__name__)


class ReferenceLoads:
    """Loads in progress, at most one for each reference of the table.

    Args:
        table: references, and the versions in memory.
        reader: finds the earlier versions of an alias.
        spec: limit of waiting requests, and pauses after failures.
        stats: counts failed loads.
        budget: limit of waiting bytes, shared with the queues of the replica.
    """

    def __init__(
        self, table: ServingTable, reader: RegistryReader, spec: ServingSpec, stats: ReplicaStats, budget: ByteBudget
    ) -> None:
        self._table = table
        self._reader = reader
        self._spec = spec
        self._stats = stats
        self._budget = budget

    def wait_for(
        self, reference: ModelReference, version: int | None, deadline: float, done: LoadDone, num_bytes: int
    ) -> Waiter:
        """Adds a request that waits for a reference; see `ModelManager.load_soon`."""
        load = reference.load or self._new(reference)
        waiter = load.add(version, deadline, done, num_bytes)
        self._start(reference, load)
        return waiter

    def begin(self, reference: ModelReference) -> Load:
        """Returns the current load of a reference, or a new one; it continues even if no request waits for it."""
        load = reference.load or self._new(reference)
        load.is_firm = True
        self._start(reference, load)
        return load

    def begin_due(self) -> list[Load]:
        """Starts the loads of models that should be in memory and are not, and whose last load did not just fail."""
        now = asyncio.get_running_loop().time()
        return [
            self.begin(reference)
            for reference in self._table.references.values()
            if (reference.serving is not None or reference.spec.pinned or reference.is_desired)
            and reference.named is not None
            and reference.is_due(reference.named.version, now)
        ]

    async def close(self, timeout_s: float) -> None:
        """Ends all loads; those that requests wait for may end within `timeout_s`, then these get an error."""
        loads = [reference.load for reference in self._table.references.values() if reference.load is not None]
        await have_ended([load for load in loads if load.num_waiting], timeout_s)
        tasks = [load.task for load in loads if load.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for load in loads:
            load.finish(lambda _: Overloaded("the replica is stopping; retry", 1.0))

    def _new(self, reference: ModelReference) -> Load:
        return Load(f"model {reference.spec.name!r}", self._spec.batching, self._budget)

    def _start(self, reference: ModelReference, load: Load) -> None:
        """Starts a load, unless it is in progress."""
        if reference.load is None:
            reference.load = load
            load.task = load.loop.create_task(self._run(reference, load))

    async def _run(self, reference: ModelReference, load: Load) -> None:
        """Executes one load from start to end; then all its waiters have a result."""
        try:
            await self._fill(reference, load)
        except MaasError as failure:
            load.error = failure
        except Exception:
            log.exception("model %r could not be loaded because of an unexpected error", reference.spec.name)
            load.error = MaasError(
                f"model {reference.spec.name!r} could not be loaded; the replica's log has the cause"
            )
        reference.load = None
        reference.is_desired = False

        def answer(version: int | None) -> Loaded | MaasError:
            if reference.serving is not None and version in (None, reference.serving):
                loaded = self._table.cache.loaded[reference.spec.name, reference.serving]
                loaded.used_s = monotonic()
                return loaded
            moved = NotFound(f"this pool no longer serves version {version} of model {reference.spec.name!r}")
            return load.error or reference.error or moved

        load.finish(answer)

    async def _fill(self, reference: ModelReference, load: Load) -> None:
        """Loads the version that a reference names; if it is broken, the previous version of its alias.

        Raises:
            MaasError: nothing new is in memory; the previous models still are.
        """
        wanted = reference.named
        if wanted is None or reference.serving == wanted.version:
            return
        error = reference.error
        older = [reference.fallback] if reference.fallback is not None else []
        if reference.is_due(wanted.version, load.loop.time()) or error is None:
            try:
                await self._put(reference, wanted, load)
            except Overloaded:
                raise  # not caused by the version
            except MaasError as failure:
                error = failure
                self._stats.load_failed(wanted.model, wanted.version)
                reference.note_failure(wanted.version, error, load.loop.time(), self._spec.refresh)
                what = f"model {reference.spec.name!r}: version {wanted.version} cannot be loaded"
                log.error("%s: %s; serving version %s", what, original(error), reference.serving)
            else:
                reference.note_success()
                return
            if reference.serving is None and not error.retryable:
                older = await self._reader.earlier(reference.spec, wanted)
        if reference.serving is None and not error.retryable:
            for version in older:
                try:
                    await self._put(reference, version, load)
                except MaasError as failure:
                    log.error("%s cannot be loaded either: %s", name_of(version), original(failure))
                else:
                    reference.fallback = version
                    return
        raise error

    async def _put(self, reference: ModelReference, version: Version, load: Load) -> None:
        """Loads a version and directs requests to it."""
        load.version = version.version
        self._table.serve(reference, await self._table.cache.bring(version, load, reference.serving))
        log.info("model %r serves version %d", reference.spec.name, version.version)


async def have_ended(loads: Iterable[Load], timeout_s: float | None = None) -> bool:
    """Waits until loads have ended, each within its own time limits; returns False if some have not."""
    tasks = [load.task for load in loads if load.task is not None]
    if not tasks:
        return True
    _, pending = await asyncio.wait(tasks, timeout=None if timeout_s is None else max(0.0, timeout_s))
    return not pending
