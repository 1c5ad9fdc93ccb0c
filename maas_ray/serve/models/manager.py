"""Model manager: keeps the model versions of a replica in memory, and follows the registry without failed requests.

Load (every byte verified) → inspect → session → warm → swap → drain the old. If a version cannot be loaded, the
previous one continues to serve and the reason is reported. If the store is unavailable, loaded models stay. With a
memory budget, the least recently used models are unloaded, and the next request for one waits for its load.
Independent of HTTP and Ray.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, TypeVar

from maas_ray.display import get_logger
from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, NotFound, Overloaded, StoreUnavailable
from maas_ray.registry.models import Model, Registry, Version, check_name
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.models.cache import ModelCache
from maas_ray.serve.models.desired_state import DesiredModel, DesiredState
from maas_ray.serve.models.loaded import Loaded, name_of
from maas_ray.serve.models.loader import ModelLoader, within
from maas_ray.serve.models.pending import Load, LoadDone, Waiter
from maas_ray.serve.models.public_errors import original
from maas_ray.serve.models.references import (
    ModelReference,
    ResolvedReference,
    check_reference,
    default_of,
    named_before,
    references_in,
)
from maas_ray.serve.models.repository_index import index
from maas_ray.serve.spec.pools import ServedModelSpec, ServingSpec
from maas_ray.serve.telemetry.stats import ReplicaStats
from maas_ray.store.objects import ObjectStore

__all__ = ["Loaded", "ModelManager"]

log = get_logger(__name__)
T = TypeVar("T")

MAX_NAMES = 20
"""Maximum number of names in a message."""


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
        self._store = store
        self.spec = spec
        self._registry = Registry(store)
        self._desired_state = DesiredState(store, pool) if spec.model_control == "explicit" else None
        self.stats = stats or ReplicaStats(pool)
        self._seen: tuple[Mapping[str, Model], Mapping[str, DesiredModel], list[ResolvedReference]] | None = None
        """Result of the last refresh; only for the thread. While nothing changes, a refresh resolves nothing."""
        self._references: dict[tuple[str, int | str], ModelReference] = {}
        self._by_name: dict[str, list[ModelReference]] = {}
        self._unloaded: set[str] = set()
        self._batch_sizes: dict[str, int] = {}
        self.budget = ByteBudget(spec.batching.max_queued_bytes)
        """Waiting bytes in this replica, of all kinds."""
        self._loader = ModelLoader(store, spec, self.stats, self.budget)
        self._cache = ModelCache(self._loader, spec, self.stats, self._is_pinned, self._withdraw)
        self._loaded = self._cache.loaded
        self._defaults: dict[str, Loaded] = {}
        # One thread for all reads of the registry, which is not thread-safe.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model-manager")
        self._follower: asyncio.Task[None] | None = None
        self._late: asyncio.Future[Any] | None = None
        self._is_closed = False

    @property
    def names(self) -> list[str]:
        """Names of the served models, in memory or not."""
        return list(self._by_name)

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted: all models to be loaded at start are loaded.

        With `strict_readiness`, also whether every model in the spec serves the version that its reference names.
        """
        if self._follower is None:
            return False
        if not self.spec.strict_readiness:
            return True
        listed = {model.name for model in self.spec.models if not model.is_pattern}
        return listed <= set(self._by_name) and not any(map(self.problems, listed))

    @property
    def is_closed(self) -> bool:
        """Whether the replica is stopping."""
        return self._is_closed

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
        self._reference(name, version)
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
        reference = self._reference(name, version)
        load = reference.load or self._new_load(reference)
        waiter = load.add(version, deadline, done, num_bytes)
        self._begin(reference, load)
        return waiter

    def versions(self, name: str) -> list[int]:
        """Returns the served versions of a model, ascending, including those not in memory."""
        numbers = {
            reference.serving or (reference.named.version if reference.named else None)
            for reference in self._by_name.get(name, ())
        }
        return sorted(number for number in numbers if number is not None)

    def problems(self, name: str) -> list[str]:
        """Returns why references of this model do not serve the registry's version, or not as intended; else empty."""
        found = [reference.problem for reference in self._by_name.get(name, ()) if reference.problem]
        return found + [
            loaded.batcher.problem
            for loaded in self._loaded.values()
            if loaded.version.model == name and loaded.batcher.problem
        ]

    def index(self, ready_only: bool = False) -> list[dict[str, str]]:
        """Returns the index of the v2 model repository extension: name, version, state and reason of each model."""
        return index(self._references.values(), self._loaded.values(), self._cache.draining, self._unloaded, ready_only)

    async def start(self) -> None:
        """Loads the models in the spec, up to the budget, then follows the registry; a second call does nothing.

        Pinned models come first, then the others in the order of the spec until one does not fit. A model that only a
        pattern matches is loaded by its first request.

        Raises:
            MaasError: no model in the spec can be loaded. If only some cannot be loaded, `problems` and `index` report
                them, and the others are served.
        """
        if self._follower is not None:
            return
        try:
            await self._look(self.spec.refresh.load_timeout_s)
            chosen = await self._choose_first()
            loads = [self._begin_firm(reference) for reference in chosen]
            await self._wait(loads)
            self._check_start(
                [(reference, load) for reference, load in zip(chosen, loads, strict=True) if reference.is_listed]
            )
        except BaseException as error:
            await self.close()
            raise original(error)  # noqa: B904 -- for the operator of the replica, not for clients
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    def _check_start(self, listed: list[tuple[ModelReference, Load]]) -> None:
        failed = [(reference, load.error) for reference, load in listed if load.error is not None]
        for reference, error in failed:
            log.error("model %r is not served: %s", reference.spec.name, error)
        if failed and len(failed) == len(listed):
            raise failed[0][1]

    async def refresh(self) -> None:
        """Reads the registry and the requests of clients, and loads the versions that changed.

        Raises:
            StoreUnavailable: the registry could not be read in time.
        """
        await self._wait(await self._look_and_begin())

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
        desired_state = self._control(name)
        spec = None
        if version is not None:
            spec = ServedModelSpec(name=name, version=version)
        elif alias is not None:
            spec = ServedModelSpec(name=name, alias=alias)

        def write_down() -> None:
            check_reference(self._registry, name, spec, self.spec.models)
            desired_state.load(name, spec, max_batch_size)

        until = monotonic() + (timeout_s or self.spec.refresh.load_timeout_s)
        await self._in_thread("the log of desired models", self.spec.refresh.timeout_s, write_down)
        await self._look(self.spec.refresh.timeout_s)
        references = [
            reference for reference in self._by_name.get(name, ()) if spec is None or reference.spec.ref == spec.ref
        ]
        for reference in references:
            reference.try_again()
        loads = [self._begin_firm(reference) for reference in references]
        if not await self._wait(loads, until - monotonic()):
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
        desired_state = self._control(name)
        self._reference(name, None)
        until = monotonic() + (timeout_s or self.spec.limits.timeout_s)
        await self._in_thread(
            "the log of desired models", self.spec.refresh.timeout_s, lambda: desired_state.unload(name)
        )
        await self._look(self.spec.refresh.timeout_s)
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
        if self._follower is not None and self._follower.done():
            raise MaasError("the replica no longer follows the registry and must be replaced")

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stops following, answers waiting requests (for at most `drain_timeout_s`), then releases everything."""
        self._is_closed = True
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait({self._follower})
            self._follower = None
        until = monotonic() + drain_timeout_s
        loads = [reference.load for reference in self._references.values() if reference.load is not None]
        await self._wait([load for load in loads if load.num_waiting], drain_timeout_s)
        tasks = [load.task for load in loads if load.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for load in loads:
            load.finish(lambda _: Overloaded("the replica is stopping; retry", 1.0))
        self._defaults, self._references, self._by_name = {}, {}, {}
        await self._cache.close(max(0.0, until - monotonic()))
        self._thread.shutdown(wait=False, cancel_futures=True)

    # References of the pool

    def _reference(self, name: str, version: int | None) -> ModelReference:
        """Returns the reference for a name, or for one version of it; raises `NotFound`."""
        if self._is_closed:
            raise Overloaded("the replica is stopping; retry", 1.0)
        references = self._by_name.get(name)
        if not references:
            if name in self._unloaded:
                raise NotFound(f"{_unknown(name)}; it was unloaded from this pool; load it first")
            raise NotFound(f"{_unknown(name)}; this pool serves: {_listed(self._by_name) or 'none'}")
        if version is None:
            reference = default_of(references)
            if reference is None:
                raise NotFound(f"model {name!r} cannot be served: {references[0].problem}")
            return reference
        for reference in references:
            if reference.named is not None and version == (reference.serving or reference.named.version):
                return reference
        served = _listed(map(str, self.versions(name)))
        raise NotFound(f"{_unknown(name, version)}; this pool serves: {served}")

    async def _follow(self) -> None:
        usual_s = pause_s = self.spec.refresh.poll_interval_s
        while True:
            # Jitter: replicas must not all read the store at the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self._look_and_begin()
            except Exception as error:
                if pause_s <= usual_s:
                    log.warning("the registry cannot be read, serving the loaded models: %s", original(error))
                pause_s = min(2 * pause_s, max(usual_s, self.spec.refresh.max_backoff_s))
            else:
                if pause_s > usual_s:
                    log.info("the registry can be read again")
                pause_s = usual_s

    async def _look_and_begin(self) -> list[Load]:
        """Refreshes once, and starts the loads of models that should be in memory and are not."""
        if self._late is not None and not self._late.done():
            raise StoreUnavailable("the previous read of the store has not finished")
        await self._look(self.spec.refresh.timeout_s)
        self._cache.shrink()
        now = asyncio.get_running_loop().time()
        return [
            self._begin_firm(reference)
            for reference in self._references.values()
            if (reference.serving is not None or reference.spec.pinned or reference.is_desired)
            and reference.named is not None
            and reference.is_due(reference.named.version, now)
        ]

    async def _look(self, timeout_s: float) -> None:
        """Reads the registry and the desired models; models without a reference accept no more requests from now on."""

        def read() -> tuple[list[ResolvedReference], Mapping[str, DesiredModel]]:
            desired = self._desired_state.models() if self._desired_state is not None else {}
            models = self._registry.models()
            if self._seen is None or self._seen[0] is not models or self._seen[1] != desired:
                self._seen = (models, desired, references_in(models, self._store.uri, self.spec.models, desired))
            return self._seen[2], desired

        resolved_references, desired = await self._in_thread("the registry", timeout_s, read)
        self._unloaded = {name for name, desired_model in desired.items() if not desired_model.is_load}
        self._batch_sizes = {
            name: desired_model.max_batch_size
            for name, desired_model in desired.items()
            if desired_model.max_batch_size
        }
        for loaded in self._loaded.values():
            self._resize(loaded)
        if self._is_closed:
            return
        references: dict[tuple[str, int | str], ModelReference] = {}
        names: dict[str, list[ModelReference]] = {}
        for resolved in resolved_references:
            key = (resolved.spec.name, resolved.spec.ref)
            reference = self._references.get(key) or ModelReference(
                resolved.spec, resolved.is_listed, resolved.is_override
            )
            reference.note_reference(resolved)
            references[key] = reference
            names.setdefault(resolved.spec.name, []).append(reference)
        has_changed = list(references) != list(self._references)
        self._references, self._by_name = references, names
        if has_changed:
            for name in {name for name, _ in self._loaded} | set(self._defaults):
                self._settle(name)

    def _settle(self, name: str) -> None:
        """Updates the version that serves requests for a name, and retires versions without a reference."""
        references = self._by_name.get(name, [])
        default = default_of(references)
        if default is not None and default.serving is not None:
            self._defaults[name] = self._loaded[name, default.serving]
        else:
            self._defaults.pop(name, None)
        used = {reference.serving for reference in references}
        for key in [key for key in self._loaded if key[0] == name and key[1] not in used]:
            self._cache.retire(key)

    def _resize(self, loaded: Loaded) -> None:
        """Sets a model's batch size to the one that a client requested, or to the pool's."""
        wanted = self._batch_sizes.get(loaded.version.model, self.spec.batching.max_batch_size)
        if loaded.batcher.max_batch_size != wanted:
            loaded.batcher.resize(wanted)

    def _is_pinned(self, loaded: Loaded) -> bool:
        references = self._by_name.get(loaded.version.model, ())
        return any(reference.spec.pinned and reference.serving == loaded.version.version for reference in references)

    def _withdraw(self, loaded: Loaded) -> None:
        """Stops requests to a model in memory: the next request loads it again."""
        name = loaded.version.model
        for reference in self._by_name.get(name, ()):
            if reference.serving == loaded.version.version:
                reference.serving = None
        self._settle(name)

    # Loading

    def _new_load(self, reference: ModelReference) -> Load:
        return Load(f"model {reference.spec.name!r}", self.spec.batching, self.budget)

    def _begin(self, reference: ModelReference, load: Load) -> None:
        """Starts a load, unless it is in progress."""
        if reference.load is None:
            reference.load = load
            load.task = load.loop.create_task(self._run(reference, load))

    def _begin_firm(self, reference: ModelReference) -> Load:
        """Returns the current load of a reference, or a new one; it continues even if no request waits for it."""
        load = reference.load or self._new_load(reference)
        load.is_firm = True
        self._begin(reference, load)
        return load

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
                loaded = self._loaded[reference.spec.name, reference.serving]
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
                self.stats.load_failed(wanted.model, wanted.version)
                reference.note_failure(wanted.version, error, load.loop.time(), self.spec.refresh)
                what = f"model {reference.spec.name!r}: version {wanted.version} cannot be loaded"
                log.error("%s: %s; serving version %s", what, original(error), reference.serving)
            else:
                reference.note_success()
                return
            if reference.serving is None and not error.retryable:
                timeout_s = self.spec.refresh.timeout_s
                older = await self._in_thread(
                    "the registry", timeout_s, lambda: named_before(self._registry, reference.spec, wanted)
                )
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
        self._resize(await self._cache.bring(version, load, reference.serving))
        # No await from here until the swap is complete: a request sees the old set or the new one.
        name = reference.spec.name
        is_current = self._references.get((name, reference.spec.ref)) is reference
        if is_current:
            reference.serving, reference.has_served = version.version, True
        self._settle(name)
        if not is_current:
            raise NotFound(f"model {name!r} was unloaded from this pool while it was loaded")
        log.info("model %r serves version %d", name, version.version)

    async def _choose_first(self) -> list[ModelReference]:
        """Returns the references to load at start: all pinned ones, then those in the spec, until one does not fit."""
        for reference in self._references.values():
            if reference.is_listed and reference.named is None and reference.error is not None:
                raise reference.error
        known = [reference for reference in self._references.values() if reference.named is not None]
        chosen = [reference for reference in known if reference.spec.pinned]
        others = [
            reference
            for reference in known
            if not reference.spec.pinned and (reference.is_listed or reference.is_desired)
        ]
        if self.spec.memory_budget_bytes is None:
            return chosen + others
        left = self.spec.memory_budget_bytes
        left -= sum([await self._size(reference.named) for reference in chosen if reference.named is not None])
        for reference in others:
            if reference.named is None:
                continue
            num_bytes = await self._size(reference.named)
            # A model larger than the whole budget is tried anyway, so that the reason is reported now.
            if left < num_bytes <= self.spec.memory_budget_bytes:
                break
            chosen.append(reference)
            left -= num_bytes
        return chosen

    async def _size(self, version: Version) -> int:
        """Returns the memory of a version; 0 if that cannot be read, which its load then reports."""
        try:
            return await self._loader.size(version)
        except StoreUnavailable:
            raise
        except MaasError:
            return 0

    # Waits with a time limit

    async def _wait(self, loads: list[Load], timeout_s: float | None = None) -> bool:
        """Waits until loads have ended, each within its own time limits; returns False if some have not."""
        tasks = [load.task for load in loads if load.task is not None]
        if not tasks:
            return True
        _, pending = await asyncio.wait(tasks, timeout=None if timeout_s is None else max(0.0, timeout_s))
        return not pending

    async def _in_thread(self, what: str, timeout_s: float, work: Callable[[], T]) -> T:
        """Reads the registry in its thread."""
        pending: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await within(what, timeout_s, pending)
        except StoreUnavailable:
            self._late = pending
            raise

    def _control(self, name: str) -> DesiredState:
        """Returns the log of desired models, if the spec allows load and unload."""
        check_name(name, "model")
        if self._desired_state is None:
            raise BadRequest(
                "this pool does not accept load and unload: its spec has model_control: none; set it to explicit, "
                "or promote another version, which the pool follows"
            )
        return self._desired_state


def _unknown(name: str, version: int | None = None) -> str:
    """Returns the error text with Triton's beginning: its clients look for these words."""
    return f"Request for unknown model: {name!r} {'' if version is None else f'version {version} '}is not found"


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:MAX_NAMES]) + (f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else "")
