"""Which model versions are in memory in this replica, and how the set follows the registry without failing a request.

Load (every byte verified) → inspect → session → warm → swap → drain the old. A version that does not load leaves the
one before it serving and says why. A store that is away changes nothing of what is loaded. Knows no HTTP and no Ray.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from maas_ray.bundle.engine import Engine, EngineSpec
from maas_ray.bundle.format import BundleInfo, load_bundle
from maas_ray.errors import MaasError, NotFound, Overloaded, StoreUnavailable
from maas_ray.registry.models import Registry, Version
from maas_ray.serve.batcher import Batcher, BatchSpec, ByteBudget
from maas_ray.serve.runner import EngineRunner
from maas_ray.serve.spec import ApplicationSpec, ModelSpec, RefreshSpec, ServingSpec
from maas_ray.store.objects import ObjectStore, open_store

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class Loaded:
    """A model version in memory, ready to answer."""

    version: Version
    info: BundleInfo
    batcher: Batcher
    runner: EngineRunner

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """What leads an answer back to the run and the version it came from."""
        return (
            (b"x-maas-run", self.version.run.encode("ascii", "replace")),
            (b"x-maas-version", str(self.version.version).encode()),
        )


@dataclass
class Slot:
    """One model reference of the pool: what it serves now, and why it does not serve something newer."""

    spec: ModelSpec
    serving: int | None = None
    problem: str | None = None
    failed: int | None = None
    """The version whose load failed last."""
    retry_at: float = 0.0
    retry_after_s: float = field(default=0.0)


class Residency:
    """The models of one replica.

    Args:
        store: where the registry and the bundles lie.
        models: what the pool serves; the first reference of a name is the one that a URL without a version means.
        batching: of every model.
        engine: of every model.
        refresh: how the registry is followed.
    """

    def __init__(
        self,
        store: ObjectStore,
        models: Iterable[ModelSpec],
        *,
        batching: BatchSpec,
        engine: EngineSpec,
        refresh: RefreshSpec,
    ) -> None:
        self._store = store
        self._registry = Registry(store)
        self._slots = [Slot(spec) for spec in models]
        self._batching = batching
        self._engine = engine
        self._refresh_spec = refresh
        self._loaded: dict[tuple[str, int], Loaded] = {}
        self._defaults: dict[str, Loaded] = {}
        self._draining: set[Loaded] = set()
        self._budget = ByteBudget(batching.max_queued_bytes)
        # One thread for everything that waits for the store: the registry is not meant for several.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="residency")
        self._follower: asyncio.Task[None] | None = None
        self._pending: asyncio.Future[Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the served models."""
        return list(self._defaults)

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

    @property
    def is_ready(self) -> bool:
        """Whether every reference of the pool is served."""
        return self._follower is not None and all(slot.serving is not None for slot in self._slots)

    async def start(self) -> None:
        """Loads everything, then follows the registry in the background; a second call does nothing.

        Raises:
            MaasError: a model cannot be resolved or loaded, and nothing older of it can serve.
        """
        if self._follower is not None:
            return
        try:
            for index, wanted in (
                await self._run_in_thread(self._resolve_all, self._refresh_spec.load_timeout_s)
            ).items():
                if isinstance(wanted, MaasError):
                    raise wanted
                await self._load_first(index, wanted)
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
        wanted = await self._run_in_thread(self._resolve_all, self._refresh_spec.timeout_s)
        now = asyncio.get_running_loop().time()
        for index, version in wanted.items():
            slot = self._slots[index]
            if isinstance(version, MaasError):
                slot.problem = str(version)
            elif version.version == slot.serving:
                slot.problem, slot.failed = None, None
            elif version.version != slot.failed or now >= slot.retry_at:
                await self._move(index, version)

    def check_health(self) -> None:
        """Raises `MaasError` if a run hangs or the follower of the registry has ended."""
        for (name, version), loaded in self._loaded.items():
            if loaded.batcher.busy_s > self._refresh_spec.stuck_run_s:
                raise MaasError(
                    f"model {name!r} version {version} has been running one batch for {loaded.batcher.busy_s:.0f} s; "
                    "the replica must be replaced"
                )
        if self._follower is not None and self._follower.done():
            raise MaasError("the replica no longer follows the registry and must be replaced")

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Stops following, answers what waits (for at most `drain_timeout_s`), then gives everything back."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
            self._follower = None
        everything = [*self._loaded.values(), *self._draining]
        self._loaded, self._defaults = {}, {}
        await asyncio.gather(*(self._drain(loaded, drain_timeout_s) for loaded in everything))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _follow(self) -> None:
        pause_s = self._refresh_spec.every_s
        while True:
            # Jitter: replicas must not all ask the store in the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self.refresh()
                if pause_s > self._refresh_spec.every_s:
                    log.info("the registry answers again")
                pause_s = self._refresh_spec.every_s
            except Exception as error:
                if pause_s <= self._refresh_spec.every_s:
                    log.warning("the registry does not answer, serving what is loaded: %s", error)
                pause_s = min(2 * pause_s, self._refresh_spec.max_backoff_s)

    def _resolve_all(self) -> dict[int, Version | MaasError]:
        """Runs in the thread: what each slot's reference names now, or why it names nothing."""
        models = self._registry.models()
        wanted: dict[int, Version | MaasError] = {}
        for index, slot in enumerate(self._slots):
            model = models.get(slot.spec.name)
            number = slot.spec.version or (model.aliases.get(slot.spec.alias) if model else None)
            try:
                known = model.versions.get(number) if model and number else None
                wanted[index] = known or self._registry.resolve(slot.spec.name, slot.spec.ref)
            except MaasError as error:
                wanted[index] = error
        return wanted

    async def _load_first(self, index: int, version: Version) -> None:
        """Loads a slot for the first time; if its version is broken, what the alias named before serves instead."""
        slot = self._slots[index]
        try:
            await self._put(index, version)
        except MaasError as error:
            self._note(slot, version, error)
            for older in await self._run_in_thread(
                lambda: _earlier(self._registry, slot.spec, version), self._refresh_spec.load_timeout_s
            ):
                try:
                    await self._put(index, older)
                    return
                except MaasError as again:
                    log.warning("model %r version %d does not load either: %s", older.model, older.version, again)
            raise

    async def _move(self, index: int, version: Version) -> None:
        slot = self._slots[index]
        try:
            await self._put(index, version)
        except MaasError as error:
            self._note(slot, version, error)
        else:
            slot.problem, slot.failed, slot.retry_after_s = None, None, 0.0

    def _note(self, slot: Slot, version: Version, error: MaasError) -> None:
        slot.retry_after_s = min(
            max(2 * slot.retry_after_s, self._refresh_spec.every_s), self._refresh_spec.max_backoff_s
        )
        slot.retry_at = asyncio.get_running_loop().time() + slot.retry_after_s
        slot.failed = version.version
        slot.problem = f"version {version.version} does not load: {error}"
        log.error("model %r %s; still serving version %s", slot.spec.name, slot.problem, slot.serving)

    async def _put(self, index: int, version: Version) -> None:
        """Makes `version` what the slot serves, then drains what nobody refers to any more."""
        slot = self._slots[index]
        key = (version.model, version.version)
        if key not in self._loaded:
            info, engine = await self._run_in_thread(lambda: self._load(version), self._refresh_spec.load_timeout_s)
            self._loaded[key] = self._serve(version, info, engine)
        # From here no await until the swap is complete: a request sees the old set or the new one.
        slot.serving = version.version
        for other in reversed(self._slots):
            if other.serving is not None:
                self._defaults[other.spec.name] = self._loaded[(other.spec.name, other.serving)]
        used = {(other.spec.name, other.serving) for other in self._slots}
        unused = [self._loaded.pop(key) for key in list(self._loaded) if key not in used]
        log.info("model %r serves version %d", version.model, version.version)
        for old in unused:
            self._draining.add(old)
            old.batcher.close(when_idle=lambda old=old: self._release(old))  # type: ignore[misc]

    def _load(self, version: Version) -> tuple[BundleInfo, Engine]:
        bundle = load_bundle(self._store, version.bundle)
        return bundle.info, Engine(bundle, self._engine)

    def _serve(self, version: Version, info: BundleInfo, engine: Engine) -> Loaded:
        loop = asyncio.get_running_loop()
        runner = EngineRunner(engine, loop)
        batcher = Batcher(
            runner,
            self._batching,
            loop,
            can_merge=info.signature.is_batched,
            budget=self._budget,
            name=f"model {version.model!r} version {version.version}",
        )
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

    async def _run_in_thread(self, work: Callable[[], T], timeout_s: float) -> T:
        """Bounded wait for the thread; work that is late goes on there, and is not started twice."""
        pending: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._pending = pending
        done, _ = await asyncio.wait({pending}, timeout=timeout_s)
        if not done:
            raise StoreUnavailable(f"the store {self._store.uri} did not answer within {timeout_s:g} s")
        return pending.result()


def _earlier(registry: Registry, spec: ModelSpec, version: Version) -> list[Version]:
    """What the alias named before, newest first, each once; nothing for a fixed version."""
    if spec.version is not None:
        return []
    numbers = [
        int(event["version"])
        for _, event in registry.history(spec.name)
        if event["type"] == "alias" and event["alias"] == spec.alias
    ]
    earlier = [number for number in dict.fromkeys(reversed(numbers)) if number != version.version]
    return [registry.resolve(spec.name, number) for number in earlier]


def make_residency(spec: ApplicationSpec) -> Residency:
    """The models of one replica as a spec describes them; nothing is loaded before `start`."""
    return Residency(
        open_store(spec.storage),
        spec.models,
        batching=spec.batching,
        engine=engine_spec(spec),
        refresh=spec.refresh,
    )


def engine_spec(spec: ServingSpec) -> EngineSpec:
    """Threads and warm-up sizes, derived from what a replica owns."""
    sizes = [1 << power for power in range(spec.batching.max_batch_size.bit_length())]
    return EngineSpec(
        threads=max(1, int(spec.resources.cpus)),
        gpus=spec.resources.gpus,
        warmup_rows=tuple(sorted({*sizes, spec.batching.max_batch_size})),
    )
