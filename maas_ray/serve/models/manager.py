"""Model manager: keeps the model versions of a replica in memory, and follows the registry without failed requests.

Load (every byte verified) → inspect → session → warm → swap → drain the old. If a version cannot be loaded, the
previous one continues to serve and the reason is reported. If the store is unavailable, loaded models stay. With a
memory budget, the least recently used models are unloaded, and the next request for one waits for its load.
Independent of HTTP and Ray. Its parts:

    registry_reader.py     what the registry names and what clients request; registry_follower.py reads it again
    serving_table.py       which version serves which name
    reference_loads.py     loads and swaps; pending.py: the requests that wait for one
    cache.py               versions in memory, the memory budget, draining; loader.py: bytes to a warm model
"""

import asyncio
from time import monotonic

from maas_ray.errors import DeadlineExceeded, MaasError
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.loader import ModelLoader
from maas_ray.serve.models.pending import LoadDone, Waiter
from maas_ray.serve.models.public_errors import original
from maas_ray.serve.models.reference_loads import ReferenceLoads, have_ended
from maas_ray.serve.models.registry_follower import RegistryFollower
from maas_ray.serve.models.registry_reader import RegistryReader
from maas_ray.serve.models.repository_index import index
from maas_ray.serve.models.serving_table import ServingTable
from maas_ray.serve.models.startup import check_first, choose_first
from maas_ray.serve.spec.pools import ServedModelSpec, ServingSpec
from maas_ray.serve.telemetry.stats import ReplicaStats
from maas_ray.store.objects import ObjectStore

__all__ = ["Loaded", "ModelManager"]


class ModelManager:
    """Models of one replica. All methods are called on the loop.

    Args:
        store: store of the registry and the bundles.
        spec: models, batching, refresh of the registry and memory budget. The first reference of a name serves URLs
            without a version.
        pool: name of the pool: replicas of one pool share the load and unload requests of clients.
        stats: counts loads and evictions.
    """

    def __init__(
        self, store: ObjectStore, spec: ServingSpec, *, pool: str = "default", stats: ReplicaStats | None = None
    ) -> None:
        self.spec = spec
        self.stats = stats or ReplicaStats(pool)
        self.budget = ByteBudget(spec.batching.max_queued_bytes)
        """Waiting bytes in this replica, of all kinds."""
        self._reader = RegistryReader(store, spec, pool)
        self._loader = ModelLoader(store, spec, self.stats, self.budget)
        self._table = ServingTable(self._loader, spec, self.stats)
        self._cache = self._table.cache
        self._loads = ReferenceLoads(self._table, self._reader, spec, self.stats, self.budget)
        self._follower = RegistryFollower(self._reader, self._table, self._loads, spec.refresh)
        # For `find`, which every request calls.
        self._defaults, self._loaded = self._table.defaults, self._cache.loaded

    @property
    def names(self) -> list[str]:
        """Names of the served models, in memory or not."""
        return self._table.names

    @property
    def memory_bytes(self) -> int:
        """Bytes that models use of the memory budget, including those being loaded and those being drained."""
        return self._cache.num_bytes

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted: all models to be loaded at start are loaded.

        With `strict_readiness`, also whether every model in the spec serves the version that its reference names.
        """
        if not self._follower.is_started:
            return False
        if not self.spec.strict_readiness:
            return True
        listed = {model.name for model in self.spec.models if not model.is_pattern}
        return listed <= set(self._table.names) and not any(map(self.problems, listed))

    @property
    def is_closed(self) -> bool:
        """Whether the replica is stopping."""
        return self._table.is_closed

    def find(self, name: str, version: int | None = None) -> Loaded | None:
        """Returns the version for a request; None if the pool serves it but it is not in memory: see `load_soon`.

        The model is not unloaded before a request that is queued soon after (within 50 ms).

        Raises:
            NotFound: the pool serves no such model or version; the message lists those it serves.
            Overloaded: the replica is stopping.
        """
        found = self._defaults.get(name) if version is None else self._loaded.get((name, version))
        if found is not None:
            found.used_s = monotonic()
            return found
        self._table.reference(name, version)
        return None

    def load_soon(
        self, name: str, version: int | None, deadline: float, done: LoadDone, *, num_bytes: int = 0
    ) -> Waiter:
        """Loads a model that `find` did not find in memory; requests for the same model share one load.

        Args:
            name: name of the model.
            version: version in the URL, if any.
            deadline: time on the loop's clock after which the model is not wanted.
            done: called once on the loop with the model or the error, never before this returns.
            num_bytes: memory used by the waiting request, counted as if it were queued.

        Returns:
            The waiter, for `cancel`.

        Raises:
            NotFound: the pool serves no such model or version.
            Overloaded: too many requests wait for this model already, or the replica is stopping.
            DeadlineExceeded: the deadline has already passed.
        """
        return self._loads.wait_for(self._table.reference(name, version), version, deadline, done, num_bytes)

    def versions(self, name: str) -> list[int]:
        """Returns the served versions of a model, ascending, including those not in memory."""
        return self._table.versions(name)

    def problems(self, name: str) -> list[str]:
        """Returns why references of this model do not serve the registry's version, or not as intended; else empty."""
        return self._table.problems(name)

    def index(self, ready_only: bool = False) -> list[dict[str, str]]:
        """Returns the index of the v2 model repository extension: name, version, state and reason of each model."""
        table = self._table
        return index(table.references.values(), self._loaded.values(), self._cache.draining, table.unloaded, ready_only)

    async def start(self) -> None:
        """Loads the models in the spec, up to the budget, then follows the registry; a second call does nothing.

        Pinned models come first, then the others in the order of the spec until one does not fit. A model that only a
        pattern matches is loaded by its first request.

        Raises:
            MaasError: no model in the spec can be loaded. If only some cannot be loaded, `problems` and `index` report
                them, and the others are served.
        """
        if self._follower.is_started:
            return
        try:
            await self._follower.look(self.spec.refresh.load_timeout_s)
            references = self._table.references.values()
            chosen = await choose_first(references, self._loader, self.spec.memory_budget_bytes)
            loads = [self._loads.begin(reference) for reference in chosen]
            await have_ended(loads)
            check_first(chosen, loads)
        except BaseException as error:
            await self.close()
            raise original(error)  # noqa: B904 -- for the operator of the replica, not for clients
        self._follower.start()

    async def refresh(self) -> None:
        """Reads the registry and the requests of clients, and loads the versions that changed.

        Raises:
            StoreUnavailable: the registry could not be read in time.
        """
        await have_ended(await self._follower.refresh())

    async def load(
        self,
        name: str,
        *,
        version: int | None = None,
        alias: str | None = None,
        max_batch_size: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Requests a model from all replicas of the pool, and loads it here.

        Args:
            name: name of a model in the registry; the spec need not contain it.
            version: version for URLs without one; None: the version of `alias`, else of the spec, else of `production`.
            alias: alias for URLs without a version; changes of it are followed.
            max_batch_size: maximum rows of one run of this model, until the next load request; None: as in the spec.
            timeout_s: maximum wait; by default `refresh.load_timeout_s`.

        Raises:
            BadRequest: the pool's spec does not allow it.
            NotFound: the registry has no such model, version or alias; nothing was recorded.
            MaasError: the version cannot be loaded; the previous one continues to serve.
            DeadlineExceeded: it is still being loaded.
        """
        self._reader.check_control(name)
        spec = None
        if version is not None:
            spec = ServedModelSpec(name=name, version=version)
        elif alias is not None:
            spec = ServedModelSpec(name=name, alias=alias)
        until = monotonic() + (timeout_s or self.spec.refresh.load_timeout_s)
        await self._reader.request_load(name, spec, max_batch_size)
        await self._follower.look()
        references = [reference for reference in self._table.of(name) if spec is None or reference.spec.ref == spec.ref]
        for reference in references:
            reference.try_again()
        loads = [self._loads.begin(reference) for reference in references]
        if not await have_ended(loads, until - monotonic()):
            raise DeadlineExceeded(f"model {name!r} is still being loaded; see the repository index for its state")
        for error in (*(load.error for load in loads), *(reference.error for reference in references)):
            if error is not None:
                raise error

    async def unload(self, name: str, *, timeout_s: float | None = None) -> None:
        """Requests that no replica of the pool serves a model, and waits for its last responses here.

        Args:
            name: name of the model.
            timeout_s: maximum wait; by default `limits.timeout_s`.

        Raises:
            BadRequest: the pool's spec does not allow it.
            NotFound: the pool serves no such model.
            DeadlineExceeded: it accepts no more requests, but has not answered all earlier ones.
        """
        self._reader.check_control(name)
        self._table.reference(name, None)
        until = monotonic() + (timeout_s or self.spec.limits.timeout_s)
        await self._reader.request_unload(name)
        await self._follower.look()
        leaving = [loaded.released.wait() for loaded in self._cache.draining if loaded.version.model == name]
        try:
            await asyncio.wait_for(asyncio.gather(*leaving), max(0.0, until - monotonic()))
        except TimeoutError:
            raise DeadlineExceeded(f"model {name!r} accepts no more requests, but has some unanswered") from None

    def check_health(self) -> None:
        """Raises `MaasError` if a run hangs or the task that follows the registry has ended."""
        for loaded in (*self._loaded.values(), *self._cache.draining):
            if loaded.batcher.busy_s > self.spec.stuck_run_s:
                raise MaasError(
                    f"{loaded.name} has been running one batch for {loaded.batcher.busy_s:.0f} s; "
                    "the replica must be replaced"
                )
        if self._follower.has_failed:
            raise MaasError("the replica no longer follows the registry and must be replaced")

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stops following, answers waiting requests (for at most `drain_timeout_s`), then releases everything."""
        self._table.is_closed = True
        await self._follower.stop()
        until = monotonic() + drain_timeout_s
        await self._loads.close(drain_timeout_s)
        self._table.clear()
        await self._cache.close(max(0.0, until - monotonic()))
        self._reader.close()
