"""Which model versions are in memory in this replica, and how the set follows the registry without failing a request.

Load (every byte verified) → inspect → session → warm → swap → drain the old. A version that does not load leaves the
one before it serving and says why. A store that is away changes nothing of what is loaded. With a memory budget, models
that nobody has asked for longest are unloaded, and the next request for one waits for its load. Knows no HTTP, no Ray.
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
"""Names that a message lists at most."""


class ModelManager:
    """The models of one replica. All methods are called on the loop.

    Args:
        store: where the registry and the bundles lie.
        spec: the models, how they are batched, how the registry is followed and how much memory there is. The first
            reference of a name is the one that a URL without a version means.
        pool: the pool's name: replicas of one pool share what callers have asked to load and unload.
        stats: where loads and evictions are counted.
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
        """What the references named at the last look; only for the thread. While nothing changes, a look resolves nothing."""
        self._references: dict[tuple[str, int | str], ModelReference] = {}
        self._by_name: dict[str, list[ModelReference]] = {}
        self._unloaded: set[str] = set()
        self._batch_sizes: dict[str, int] = {}
        self.budget = ByteBudget(spec.batching.max_queued_bytes)
        """Bytes that wait in this replica, for whatever they wait."""
        self._loader = ModelLoader(store, spec, self.stats, self.budget)
        self._cache = ModelCache(self._loader, spec, self.stats, self._is_pinned, self._withdraw)
        self._loaded = self._cache.loaded
        self._defaults: dict[str, Loaded] = {}
        # One thread for everything that asks the registry, which is not meant for several.
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
        """Whether requests are taken: everything that is loaded at start was loaded.

        With `strict_readiness`, also whether every model that the spec lists serves what it names.
        """
        if self._follower is None:
            return False
        if not self.spec.strict_readiness:
            return True
        listed = {model.name for model in self.spec.models if not model.is_pattern}
        return listed <= set(self._by_name) and not any(map(self.problems, listed))

    @property
    def is_closed(self) -> bool:
        """Whether the replica is being stopped."""
        return self._is_closed

    def find(self, name: str, version: int | None = None) -> Loaded | None:
        """The version that answers a request; None if this pool has it, but not in memory: see `load_soon`.

        A request that is queued soon after (within 50 ms) is safe: the model is not unloaded under it.

        Raises:
            NotFound: the pool serves no such model or version; the message lists what it serves.
            Overloaded: the replica is being stopped.
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
        """Loads a model that `find` did not have in memory; requests for the same one share one load.

        Args:
            name: of the model.
            version: as in the URL.
            deadline: time of the loop's clock after which nobody waits.
            done: called once on the loop with the model or the error, never before this returns.
            num_bytes: what the waiting request holds in memory, counted as if it were queued.

        Returns:
            The waiter, for `cancel`.

        Raises:
            NotFound: the pool serves no such model or version.
            Overloaded: too many requests wait for this model already, or the replica is being stopped.
            DeadlineExceeded: the deadline has passed already.
        """
        reference = self._reference(name, version)
        load = reference.load or self._new_load(reference)
        waiter = load.add(version, deadline, done, num_bytes)
        self._begin(reference, load)
        return waiter

    def versions(self, name: str) -> list[int]:
        """Served versions of a model, ascending; those not in memory too."""
        numbers = {
            reference.serving or (reference.named.version if reference.named else None)
            for reference in self._by_name.get(name, ())
        }
        return sorted(number for number in numbers if number is not None)

    def problems(self, name: str) -> list[str]:
        """Why references of this model do not serve what the registry names, or not as they should; empty if they do."""
        found = [reference.problem for reference in self._by_name.get(name, ()) if reference.problem]
        return found + [
            loaded.batcher.problem
            for loaded in self._loaded.values()
            if loaded.version.model == name and loaded.batcher.problem
        ]

    def index(self, ready_only: bool = False) -> list[dict[str, str]]:
        """The index of the v2 model repository extension: name, version, state and reason of what the pool knows."""
        return index(self._references.values(), self._loaded.values(), self._cache.draining, self._unloaded, ready_only)

    async def start(self) -> None:
        """Loads what the spec lists, as far as the budget goes, then follows the registry; a second call does nothing.

        Pinned models come first, then the others in the order of the spec until one does not fit. What a pattern
        matches is loaded by its first request.

        Raises:
            MaasError: no model that the spec lists can be loaded. One that cannot beside others that can is reported by
                `problems` and `index`: it must not keep the others from being served.
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
            raise original(error)  # noqa: B904 -- for whoever starts the replica, not for a caller
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    def _check_start(self, listed: list[tuple[ModelReference, Load]]) -> None:
        failed = [(reference, load.error) for reference, load in listed if load.error is not None]
        for reference, error in failed:
            log.error("model %r is not served: %s", reference.spec.name, error)
        if failed and len(failed) == len(listed):
            raise failed[0][1]

    async def refresh(self) -> None:
        """Looks at the registry, and at what callers have asked for, and loads what has moved.

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
        """Asks the pool, all its replicas, to serve a model, and loads it here.

        Args:
            name: a model of the registry; the spec need not list it.
            version: this version answers URLs without one; None: what `alias`, else the spec, else `production` names.
            alias: as `version`, and followed.
            max_batch_size: most rows of one run of this model, until it is loaded again; None: what the spec says.
            timeout_s: longest wait; by default `refresh.load_timeout_s`.

        Raises:
            BadRequest: the pool's spec does not allow it.
            NotFound: the registry has no such model, version or alias; nothing was written down.
            MaasError: what is named does not load; what served before goes on serving.
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
            raise DeadlineExceeded(f"model {name!r} is still being loaded; look at the repository index")
        for error in (*(load.error for load in loads), *(reference.error for reference in references)):
            if error is not None:
                raise error

    async def unload(self, name: str, *, timeout_s: float | None = None) -> None:
        """Asks the pool, all its replicas, to serve a model no longer, and waits until its last answers are out here.

        Args:
            name: of the model.
            timeout_s: longest wait; by default `limits.timeout_s`.

        Raises:
            BadRequest: the pool's spec does not allow it.
            NotFound: the pool serves no such model.
            DeadlineExceeded: it takes no requests any more, but has not answered all it had.
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
            raise DeadlineExceeded(f"model {name!r} takes no requests any more, but still answers some") from None

    def check_health(self) -> None:
        """Raises `MaasError` if a run hangs or the follower of the registry has ended."""
        for loaded in (*self._loaded.values(), *self._cache.draining):
            if loaded.batcher.busy_s > self.spec.stuck_run_s:
                raise MaasError(
                    f"{loaded.name} has been running one batch for {loaded.batcher.busy_s:.0f} s; "
                    "the replica must be replaced"
                )
        if self._follower is not None and self._follower.done():
            raise MaasError("the replica no longer follows the registry and must be replaced")

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stops following, answers what waits (for at most `drain_timeout_s`), then gives everything back."""
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
            load.finish(lambda _: Overloaded("the replica is being stopped; send the request again", 1.0))
        self._defaults, self._references, self._by_name = {}, {}, {}
        await self._cache.close(max(0.0, until - monotonic()))
        self._thread.shutdown(wait=False, cancel_futures=True)

    # What the pool knows

    def _reference(self, name: str, version: int | None) -> ModelReference:
        """The reference that answers for a name, or for one version of it; raises `NotFound`."""
        if self._is_closed:
            raise Overloaded("the replica is being stopped; send the request again", 1.0)
        references = self._by_name.get(name)
        if not references:
            if name in self._unloaded:
                raise NotFound(f"{_unknown(name)}; it was unloaded from this pool and must be loaded again first")
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
            # Jitter: replicas must not all ask the store in the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self._look_and_begin()
            except Exception as error:
                if pause_s <= usual_s:
                    log.warning("the registry cannot be read, serving what is loaded: %s", original(error))
                pause_s = min(2 * pause_s, max(usual_s, self.spec.refresh.max_backoff_s))
            else:
                if pause_s > usual_s:
                    log.info("the registry can be read again")
                pause_s = usual_s

    async def _look_and_begin(self) -> list[Load]:
        """Looks once, and begins to load what should be in memory and is not."""
        if self._late is not None and not self._late.done():
            raise StoreUnavailable("the store has not answered the question before this one")
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
        """Reads the registry and the desired models; what is not referred to any more takes no requests from here on."""

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
        """Makes requests for a name go where its references say, and retires what none of them serves."""
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
        """Gives a model the batch size that a caller has asked for, or the pool's."""
        wanted = self._batch_sizes.get(loaded.version.model, self.spec.batching.max_batch_size)
        if loaded.batcher.max_batch_size != wanted:
            loaded.batcher.resize(wanted)

    def _is_pinned(self, loaded: Loaded) -> bool:
        references = self._by_name.get(loaded.version.model, ())
        return any(reference.spec.pinned and reference.serving == loaded.version.version for reference in references)

    def _withdraw(self, loaded: Loaded) -> None:
        """Makes a model cold: its next request loads it."""
        name = loaded.version.model
        for reference in self._by_name.get(name, ()):
            if reference.serving == loaded.version.version:
                reference.serving = None
        self._settle(name)

    # Loading

    def _new_load(self, reference: ModelReference) -> Load:
        return Load(f"model {reference.spec.name!r}", self.spec.batching, self.budget)

    def _begin(self, reference: ModelReference, load: Load) -> None:
        """Begins a load, unless it is in progress."""
        if reference.load is None:
            reference.load = load
            load.task = load.loop.create_task(self._run(reference, load))

    def _begin_firm(self, reference: ModelReference) -> Load:
        """The load in progress of a reference, or a new one, which goes on although nobody waits for it."""
        load = reference.load or self._new_load(reference)
        load.is_firm = True
        self._begin(reference, load)
        return load

    async def _run(self, reference: ModelReference, load: Load) -> None:
        """One load from beginning to end: afterwards everybody who waited has an answer."""
        try:
            await self._fill(reference, load)
        except MaasError as failure:
            load.error = failure
        except Exception:
            log.exception("model %r could not be loaded for an unexpected reason", reference.spec.name)
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
            moved = NotFound(f"this pool serves version {version} of model {reference.spec.name!r} no longer")
            return load.error or reference.error or moved

        load.finish(answer)

    async def _fill(self, reference: ModelReference, load: Load) -> None:
        """Brings what a reference names into memory; if that is broken, what its alias named before.

        Raises:
            MaasError: nothing new is in memory; what was there still is.
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
                raise  # says nothing about the version
            except MaasError as failure:
                error = failure
                self.stats.load_failed(wanted.model, wanted.version)
                reference.note_failure(wanted.version, error, load.loop.time(), self.spec.refresh)
                what = f"model {reference.spec.name!r}: version {wanted.version} does not load"
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
                    log.error("%s does not load either: %s", name_of(version), original(failure))
                else:
                    reference.fallback = version
                    return
        raise error

    async def _put(self, reference: ModelReference, version: Version, load: Load) -> None:
        """Loads a version and lets requests go to it."""
        load.version = version.version
        self._resize(await self._cache.bring(version, load, reference.serving))
        # From here no await until the swap is complete: a request sees the old set or the new one.
        name = reference.spec.name
        is_current = self._references.get((name, reference.spec.ref)) is reference
        if is_current:
            reference.serving, reference.has_served = version.version, True
        self._settle(name)
        if not is_current:
            raise NotFound(f"model {name!r} was unloaded from this pool while it was loaded")
        log.info("model %r serves version %d", name, version.version)

    async def _choose_first(self) -> list[ModelReference]:
        """What is loaded at start: everything pinned, then what the spec lists, until something does not fit."""
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
            # One that is larger than the whole budget is tried all the same, so that the reason is heard now.
            if left < num_bytes <= self.spec.memory_budget_bytes:
                break
            chosen.append(reference)
            left -= num_bytes
        return chosen

    async def _size(self, version: Version) -> int:
        """What a version takes; 0 where that cannot be read, which its load says then."""
        try:
            return await self._loader.size(version)
        except StoreUnavailable:
            raise
        except MaasError:
            return 0

    # Waiting, always with a bound

    async def _wait(self, loads: list[Load], timeout_s: float | None = None) -> bool:
        """Waits until loads have ended, each bounded by its own time limits; False if some have not."""
        tasks = [load.task for load in loads if load.task is not None]
        if not tasks:
            return True
        _, pending = await asyncio.wait(tasks, timeout=None if timeout_s is None else max(0.0, timeout_s))
        return not pending

    async def _in_thread(self, what: str, timeout_s: float, work: Callable[[], T]) -> T:
        """Asks the registry in its thread."""
        pending: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await within(what, timeout_s, pending)
        except StoreUnavailable:
            self._late = pending
            raise

    def _control(self, name: str) -> DesiredState:
        """The log of desired models, if the spec allows any."""
        check_name(name, "model")
        if self._desired_state is None:
            raise BadRequest(
                "this pool does not take load and unload: its spec has model_control: none; set it to explicit, "
                "or promote another version, which the pool follows"
            )
        return self._desired_state


def _unknown(name: str, version: int | None = None) -> str:
    """As Triton begins this error: its clients look for the words."""
    return f"Request for unknown model: {name!r} {'' if version is None else f'version {version} '}is not found"


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:MAX_NAMES]) + (f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else "")
