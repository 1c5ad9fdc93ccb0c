"""Registry follower: keeps the models of a replica at the registry's versions, also when the store fails for a time."""

import asyncio
import random

from maas_ray.display import get_logger
from maas_ray.errors import StoreUnavailable
from maas_ray.serve.models.pending import Load
from maas_ray.serve.models.public_errors import original
from maas_ray.serve.models.reference_loads import ReferenceLoads
from maas_ray.serve.models.registry_reader import RegistryReader
from maas_ray.serve.models.serving_table import ServingTable
from maas_ray.serve.spec.pools import RefreshSpec

log = get_logger(__name__)

TASK_NAME = "registry-follower"
"""Name of the task that follows the registry."""


class RegistryFollower:
    """Reads the registry periodically, and loads the versions that changed.

    Args:
        reader: reads the registry.
        table: receives what was read.
        loads: loads models.
        spec: interval and limits of the reads.
    """

    def __init__(self, reader: RegistryReader, table: ServingTable, loads: ReferenceLoads, spec: RefreshSpec) -> None:
        self._reader = reader
        self._table = table
        self._loads = loads
        self._spec = spec
        self._task: asyncio.Task[None] | None = None

    @property
    def is_started(self) -> bool:
        """Whether `start` was called, and `stop` was not."""
        return self._task is not None

    @property
    def has_failed(self) -> bool:
        """Whether the task has ended although `stop` was not called."""
        return self._task is not None and self._task.done()

    async def look(self, timeout_s: float | None = None) -> None:
        """Reads the registry and updates the table; loads nothing.

        Args:
            timeout_s: maximum wait; by default `refresh.timeout_s`.

        Raises:
            StoreUnavailable: the registry could not be read in time.
        """
        self._table.update(await self._reader.read(timeout_s))

    async def refresh(self) -> list[Load]:
        """Reads the registry, and returns the loads that this started.

        Raises:
            StoreUnavailable: the registry could not be read in time, or the previous read has not ended.
        """
        if self._reader.is_late:
            raise StoreUnavailable("the previous read of the store has not finished")
        await self.look()
        self._table.cache.shrink()
        return self._loads.begin_due()

    def start(self) -> None:
        """Follows the registry from now on."""
        self._task = asyncio.get_running_loop().create_task(self._follow(), name=TASK_NAME)

    async def stop(self) -> None:
        """Ends the task; has no effect before `start`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _follow(self) -> None:
        usual_s = pause_s = self._spec.poll_interval_s
        while True:
            # Jitter: replicas must not all read the store at the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self.refresh()
            except Exception as error:
                if pause_s <= usual_s:
                    log.warning("the registry cannot be read, serving the loaded models: %s", original(error))
                pause_s = min(2 * pause_s, max(usual_s, self._spec.max_backoff_s))
            else:
                if pause_s > usual_s:
                    log.info("the registry can be read again")
                pause_s = usual_s
