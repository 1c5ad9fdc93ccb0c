"""Pools of a cluster and the models they serve, from records in Ray's key-value store. Reading starts no replica.

Each replica records the models of its pool. The record of a pool that is scaled to zero is kept; that of a pool which
is no longer deployed is ignored.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import orjson
from ray import serve

from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, Overloaded
from maas_ray.ray_internals import kv
from maas_ray.serve.grpc.outcome import CallOutcome
from maas_ray.serve.grpc.unnamed import Served
from maas_ray.serve.models.manager import ModelManager

log = get_logger(__name__)

_NAMESPACE = b"maas-ray"
_PREFIX = "pools/"
KEEP_S = 2.0
"""Seconds for which read records are cached, and between two checks of this pool's models."""
WRITE_EVERY_S = 30.0
"""The record is also written after this time without a change: replicas of two revisions may have alternated."""
READ_TIMEOUT_S = 3.0


class RayNeighbors:
    """Implements `Neighbors` with Ray.

    Args:
        pool: name of this pool.
        deployment: name of its deployment.
        manager: models of this pool.
    """

    def __init__(self, pool: str, deployment: str, manager: ModelManager) -> None:
        self._pool = pool
        self._deployment = deployment
        self._manager = manager
        self._is_open = manager.spec.model_control == "explicit"
        self._others: dict[str, Served] | None = None
        self._deployments: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._read_s = float("-inf")
        self._lock = asyncio.Lock()
        # One thread: however long Ray takes, at most one of our calls waits for it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="neighbors")

    async def follow(self) -> None:
        """Keeps the record of this pool up to date until the replica is closed."""
        written, written_s = frozenset[str](), float("-inf")
        while not self._manager.is_closed:
            names = frozenset(self._manager.names)
            if names != written or monotonic() - written_s > WRITE_EVERY_S:
                try:
                    await self._in_thread(_write, self._pool, self._deployment, names, self._is_open)
                    written, written_s = names, monotonic()
                except Exception as error:  # the next attempt may succeed, and no request depends on it
                    log.debug("the models of this pool could not be recorded: %s", error)
            await asyncio.sleep(KEEP_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def pools(self) -> Mapping[str, Served]:
        if monotonic() - self._read_s > KEEP_S:
            async with self._lock:
                if monotonic() - self._read_s > KEEP_S:  # no other call has read them while this one waited
                    await self._read()
        if self._others is None:
            raise Overloaded("the pool of the model cannot be determined now; retry", KEEP_S)
        return {**self._others, self._pool: Served(self._manager.names, self._is_open)}

    async def call(
        self, pool: str, method: str, body: bytes, metadata: Mapping[str, str], timeout_s: float
    ) -> CallOutcome:
        try:
            async with asyncio.timeout(timeout_s):
                handle = self._handles.get(pool) or await self._handle(pool)
                return await _answer(handle.carry.remote(method, body, dict(metadata), timeout_s))
        except TimeoutError:
            raise DeadlineExceeded("the response was not ready before the deadline; allow more time") from None
        except Exception as error:  # Serve raises many kinds of errors for an unavailable pool or a dead replica
            log.warning("pool %s did not answer a forwarded call: %s", pool, type(error).__name__)
            raise Overloaded("the pool of this model did not answer; retry", 1.0) from error

    async def _handle(self, pool: str) -> Any:
        handle = await self._in_thread(serve.get_deployment_handle, self._deployments[pool], pool)
        self._handles[pool] = handle
        return handle

    async def _read(self) -> None:
        try:
            found = await self._in_thread(_read)
            before = self._deployments
            self._deployments = {pool: deployment for pool, (deployment, _) in found.items()}
            for pool in [pool for pool in self._handles if self._deployments.get(pool) != before.get(pool)]:
                del self._handles[pool]
            self._others = {pool: served for pool, (_, served) in found.items() if pool != self._pool}
        except Exception as error:
            log.warning("the models of other pools could not be read: %s", type(error).__name__)
        self._read_s = monotonic()

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


async def _answer(response: Any) -> CallOutcome:
    try:
        return CallOutcome(*await response)
    except asyncio.CancelledError:  # disconnect or deadline: the call to the other pool ends too
        response.cancel()
        raise


def _write(pool: str, deployment: str, names: frozenset[str], is_open: bool) -> None:
    record = orjson.dumps({"deployment": deployment, "names": sorted(names), "is_open": is_open})
    kv.put(f"{_PREFIX}{pool}".encode(), record, _NAMESPACE)


def _read() -> dict[str, tuple[str, Served]]:
    found = {}
    for pool in serve.status().applications:
        record = kv.get(f"{_PREFIX}{pool}".encode(), _NAMESPACE)
        if record is None:
            continue  # not a pool of this library, or a pool that has not started
        with contextlib.suppress(KeyError, TypeError, ValueError):
            document = orjson.loads(record)
            served = Served(frozenset(document["names"]), bool(document["is_open"]))
            found[pool] = str(document["deployment"]), served
    return found
