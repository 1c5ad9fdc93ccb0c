"""Which model versions are in memory in this replica, and how the set follows the registry without failing a request.

Load (every byte verified) → inspect → session → warm → swap → drain the old. A version that does not load leaves the
one before it serving and says why. A store that is away changes nothing of what is loaded. Knows no HTTP and no Ray.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from maas_ray.bundle.engine import Engine
from maas_ray.bundle.format import BundleInfo, load_bundle
from maas_ray.errors import MaasError, NotFound, Overloaded, StoreUnavailable
from maas_ray.registry.models import Registry, Version
from maas_ray.serve.batcher import Batcher
from maas_ray.serve.queue import ByteBudget
from maas_ray.serve.runner import EngineRunner
from maas_ray.serve.slots import Slot, named_before, resolve_all
from maas_ray.serve.spec import ServingSpec
from maas_ray.store.objects import ObjectStore

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class Loaded:
    """A model version in memory, ready to answer."""

    version: Version
    info: BundleInfo
    batcher: Batcher
    runner: EngineRunner

    def __post_init__(self) -> None:
        self.headers = (
            (b"x-maas-run", self.version.run.encode("ascii", "replace")),
            (b"x-maas-version", str(self.version.version).encode()),
        )
        """What leads an answer back to the run and the version it came from."""


class Residency:
    """The models of one replica.

    Args:
        store: where the registry and the bundles lie.
        spec: the models, how they are batched, and how the registry is followed. The first reference of a name is the
            one that a URL without a version means.
    """

    def __init__(self, store: ObjectStore, spec: ServingSpec) -> None:
        self._store = store
        self._spec = spec
        self._registry = Registry(store)
        self._slots = [Slot(model) for model in spec.models]
        self._loaded: dict[tuple[str, int], Loaded] = {}
        self._defaults: dict[str, Loaded] = {}
        self._draining: set[Loaded] = set()
        self._budget = ByteBudget(spec.batching.max_queued_bytes)
        # One thread for everything that waits for the store: the registry is not meant for several.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="residency")
        self._follower: asyncio.Task[None] | None = None
        self._pending: asyncio.Future[Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the served models."""
        return list(self._defaults)

    @property
    def is_ready(self) -> bool:
        """Whether every reference of the pool is served."""
        return self._follower is not None and all(slot.serving is not None for slot in self._slots)

    def get(self, name: str, version: int | None = None) -> Loaded:
        """The version that answers a request.

        Raises:
            NotFound: the pool serves no such model or version; the message lists what it serves.
        """
        found = self._defaults.get(name) if version is None else self._loaded.get((name, version))
        if found is not None:
            return found
        if name not in self._defaults:
            raise NotFound(f"this pool serves no model {name!r}; it serves: {', '.join(self._defaults) or 'none'}")
        served = ", ".join(map(str, self.versions(name)))
        raise NotFound(f"this pool serves no version {version} of model {name!r}; it serves: {served}")

    def versions(self, name: str) -> list[int]:
        """Served versions of a model, ascending."""
        return sorted(version for model, version in self._loaded if model == name)

    def problems(self, name: str) -> list[str]:
        """Why references of this model do not serve what the registry names; empty if they do."""
        return [slot.problem for slot in self._slots if slot.spec.name == name and slot.problem]

    async def start(self) -> None:
        """Loads everything, then follows the registry in the background; a second call does nothing.

        Raises:
            MaasError: a model cannot be resolved or loaded, and nothing older of it can serve.
        """
        if self._follower is not None:
            return
        try:
            for slot, wanted in await self._resolve(self._spec.refresh.load_timeout_s):
                if isinstance(wanted, MaasError):
                    raise wanted
                await self._load_first(slot, wanted)
        except BaseException:
            await self.close()
            raise
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def refresh(self) -> None:
        """Looks at the registry once and loads what has moved; `start` calls it again and again.

        Raises:
            StoreUnavailable: the registry could not be read in time.
        """
        if self._pending is not None and not self._pending.done():
            raise StoreUnavailable("the store has not answered the question before this one")
        for slot, wanted in await self._resolve(self._spec.refresh.timeout_s):
            if isinstance(wanted, MaasError):
                slot.problem = str(wanted)
            elif wanted.version == slot.serving:
                slot.note_success()
            elif slot.is_due(wanted.version, asyncio.get_running_loop().time()):
                await self._try(slot, wanted)

    def check_health(self) -> None:
        """Raises `MaasError` if a run hangs or the follower of the registry has ended."""
        for loaded in (*self._loaded.values(), *self._draining):
            if loaded.batcher.busy_s > self._spec.refresh.stuck_run_s:
                raise MaasError(
                    f"model {loaded.version.model!r} version {loaded.version.version} has been running one batch for "
                    f"{loaded.batcher.busy_s:.0f} s; the replica must be replaced"
                )
        if self._follower is not None and self._follower.done():
            raise MaasError("the replica no longer follows the registry and must be replaced")

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stops following, answers what waits (for at most `drain_timeout_s`), then gives everything back."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait({self._follower})
            self._follower = None
        everything = [*self._loaded.values(), *self._draining]
        self._loaded, self._defaults = {}, {}
        await asyncio.gather(*(self._drain(loaded, drain_timeout_s) for loaded in everything))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _follow(self) -> None:
        usual_s = pause_s = self._spec.refresh.every_s
        while True:
            # Jitter: replicas must not all ask the store in the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self.refresh()
            except Exception as error:
                if pause_s <= usual_s:
                    log.warning("the registry cannot be read, serving what is loaded: %s", error)
                pause_s = min(2 * pause_s, max(usual_s, self._spec.refresh.max_backoff_s))
            else:
                if pause_s > usual_s:
                    log.info("the registry can be read again")
                pause_s = usual_s

    async def _resolve(self, timeout_s: float) -> list[tuple[Slot, Version | MaasError]]:
        specs = [slot.spec for slot in self._slots]
        wanted = await self._in_thread("the registry", timeout_s, lambda: resolve_all(self._registry, specs))
        return list(zip(self._slots, wanted, strict=True))

    async def _load_first(self, slot: Slot, version: Version) -> None:
        """Loads a slot for the first time; if its version is broken, what the alias named before serves instead."""
        if (error := await self._try(slot, version)) is None:
            return
        if not error.retryable:
            earlier = await self._in_thread(
                "the registry",
                self._spec.refresh.timeout_s,
                lambda: named_before(self._registry, slot.spec, version),
            )
            problem = slot.problem
            for older in earlier:
                if await self._try(slot, older) is None:
                    slot.note_failure(version.version, error, asyncio.get_running_loop().time(), self._spec.refresh)
                    slot.problem = problem
                    return
        raise error

    async def _try(self, slot: Slot, version: Version) -> MaasError | None:
        """Puts a version into service; if it does not load, notes why and leaves everything as it is."""
        try:
            await self._put(slot, version)
        except MaasError as error:
            slot.note_failure(version.version, error, asyncio.get_running_loop().time(), self._spec.refresh)
            log.error("model %r %s; serving version %s", slot.spec.name, slot.problem, slot.serving)
            return error
        slot.note_success()
        return None

    async def _put(self, slot: Slot, version: Version) -> None:
        key = (version.model, version.version)
        if key not in self._loaded:
            what = f"model {version.model!r} version {version.version}"
            info, engine = await self._in_thread(what, self._spec.refresh.load_timeout_s, lambda: self._load(version))
            self._loaded[key] = self._serve(version, info, engine, what)
        # From here no await until the swap is complete: a request sees the old set or the new one.
        slot.serving = version.version
        for other in reversed(self._slots):
            if other.serving is not None:
                self._defaults[other.spec.name] = self._loaded[(other.spec.name, other.serving)]
        used = {(other.spec.name, other.serving) for other in self._slots}
        log.info("model %r serves version %d", version.model, version.version)
        for old in [self._loaded.pop(key) for key in list(self._loaded) if key not in used]:
            self._draining.add(old)
            old.batcher.close(when_idle=lambda old=old: self._release(old))  # type: ignore[misc]

    def _load(self, version: Version) -> tuple[BundleInfo, Engine]:
        bundle = load_bundle(self._store, version.bundle)
        return bundle.info, Engine(bundle, self._spec.engine)

    def _serve(self, version: Version, info: BundleInfo, engine: Engine, name: str) -> Loaded:
        loop = asyncio.get_running_loop()
        runner = EngineRunner(engine, loop)
        batcher = Batcher(runner, self._spec.batching, loop, can_merge=engine.can_merge, budget=self._budget, name=name)
        return Loaded(version, info, batcher, runner)

    async def _drain(self, loaded: Loaded, timeout_s: float) -> None:
        idle = asyncio.Event()
        loaded.batcher.close(when_idle=idle.set)
        try:
            await asyncio.wait_for(idle.wait(), timeout_s)
        except TimeoutError:
            loaded.batcher.abort(Overloaded("the replica is being stopped; send the request again", 1.0))
        self._release(loaded)

    def _release(self, loaded: Loaded) -> None:
        self._draining.discard(loaded)
        loaded.runner.close()

    async def _in_thread(self, what: str, timeout_s: float, work: Callable[[], T]) -> T:
        """Bounded wait for the thread; work that is late goes on there, and is not started twice."""
        pending: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._pending = pending
        done, _ = await asyncio.wait({pending}, timeout=timeout_s)
        if not done:
            raise StoreUnavailable(f"{what} was not read from {self._store.uri} within {timeout_s:g} s")
        return pending.result()
