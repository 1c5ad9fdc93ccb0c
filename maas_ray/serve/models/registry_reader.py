"""Registry reader: all access of a replica to the registry and to the pool's desired models, with time limits."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from maas_ray.errors import BadRequest, StoreUnavailable
from maas_ray.registry.models import Model, Registry, Version, check_name
from maas_ray.serve.models.desired_state import DesiredModel, DesiredState
from maas_ray.serve.models.loader import within
from maas_ray.serve.models.references import ResolvedReference, check_reference, named_before, references_in
from maas_ray.serve.spec.pools import ServedModelSpec, ServingSpec
from maas_ray.store.objects import ObjectStore

T = TypeVar("T")


class PoolReading(NamedTuple):
    """One read of the store."""

    references: list[ResolvedReference]
    """References of the pool, as the registry resolves them."""
    desired: Mapping[str, DesiredModel]
    """Latest load or unload request for each model that has one."""


class RegistryReader:
    """One thread for the registry and the log of desired models: neither is thread-safe.

    Args:
        store: store of both.
        spec: models of the pool, and time limits.
        pool: name of the pool.
    """

    def __init__(self, store: ObjectStore, spec: ServingSpec, pool: str) -> None:
        self._uri = store.uri
        self._specs = spec.models
        self._timeout_s = spec.refresh.timeout_s
        self._registry = Registry(store)
        self._desired_state = DesiredState(store, pool) if spec.model_control == "explicit" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model-manager")
        self._late: asyncio.Future[Any] | None = None
        self._seen: tuple[Mapping[str, Model], Mapping[str, DesiredModel], list[ResolvedReference]] | None = None
        """Result of the last read; only for the thread. While nothing changes, a read resolves nothing."""

    @property
    def is_late(self) -> bool:
        """Whether work that exceeded its time limit has not ended yet."""
        return self._late is not None and not self._late.done()

    async def read(self, timeout_s: float | None = None) -> PoolReading:
        """Returns the current references and desired models.

        Args:
            timeout_s: maximum wait; by default `refresh.timeout_s`.

        Raises:
            StoreUnavailable: the store could not be read in time.
            MaasError: a record is damaged.
        """
        return await self._in_thread("the registry", self._read, timeout_s)

    async def earlier(self, spec: ServedModelSpec, version: Version) -> list[Version]:
        """Returns the versions that an alias named before `version`, newest first; empty for a fixed version."""
        return await self._in_thread("the registry", lambda: named_before(self._registry, spec, version))

    def check_control(self, name: str) -> DesiredState:
        """Returns the log of desired models.

        Raises:
            SpecError: not a valid name of a model.
            BadRequest: the spec does not allow load and unload.
        """
        check_name(name, "model")
        if self._desired_state is None:
            raise BadRequest(
                "this pool does not accept load and unload: its spec has model_control: none; set it to explicit, "
                "or promote another version, which the pool follows"
            )
        return self._desired_state

    async def request_load(self, name: str, spec: ServedModelSpec | None, max_batch_size: int | None) -> None:
        """Records a load request for all replicas of the pool; see `DesiredState.load`.

        Raises:
            NotFound: the registry has no such model, version or alias; nothing was recorded.
            MaasError: see `check_control` and `read`.
        """
        desired_state = self.check_control(name)

        def record() -> None:
            check_reference(self._registry, name, spec, self._specs)
            desired_state.load(name, spec, max_batch_size)

        await self._in_thread("the log of desired models", record)

    async def request_unload(self, name: str) -> None:
        """Records an unload request for all replicas of the pool.

        Raises:
            MaasError: see `check_control` and `read`.
        """
        desired_state = self.check_control(name)
        await self._in_thread("the log of desired models", lambda: desired_state.unload(name))

    def close(self) -> None:
        """Releases the thread; its current work ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self) -> PoolReading:
        desired = self._desired_state.models() if self._desired_state is not None else {}
        models = self._registry.models()
        if self._seen is None or self._seen[0] is not models or self._seen[1] != desired:
            self._seen = (models, desired, references_in(models, self._uri, self._specs, desired))
        return PoolReading(self._seen[2], desired)

    async def _in_thread(self, what: str, work: Callable[[], T], timeout_s: float | None = None) -> T:
        pending: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await within(what, timeout_s or self._timeout_s, pending)
        except StoreUnavailable:
            self._late = pending
            raise
