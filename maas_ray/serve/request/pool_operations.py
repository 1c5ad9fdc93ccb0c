"""Operations that concern all replicas of a pool: statistics, index, load and unload. Independent of protocols."""

import asyncio
from typing import Any, NamedTuple, Protocol

from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.peers import Answers
from maas_ray.serve.telemetry.model_statistics import ModelStatistics, model_statistics
from maas_ray.serve.telemetry.stats import merge_pool
from maas_ray.serve.wire.load_parameters import read_load, read_unload

METRICS_EVERY_S = 1.0
"""Minimum seconds between two collections of statistics from the pool's replicas for scrapes."""


class Peers(Protocol):
    """Calls all replicas of the pool, including this one."""

    async def ask(self, question: str, argument: str = "") -> Answers:
        """Returns the results of `PoolOperations.ask_here` of each replica, as plain JSON values."""
        ...


class IndexEntry(NamedTuple):
    """A version in the index of the model repository extension."""

    name: str
    version: str
    """Empty if the model has no version that could be served."""
    state: str
    reason: str


class PoolOperations:
    """Operations of one pool, called at one of its replicas.

    Args:
        manager: models of this replica.
        peers: the other replicas of the pool; None: there are none.
    """

    def __init__(self, manager: ModelManager, peers: Peers | None = None) -> None:
        self._manager = manager
        self._peers = peers
        self._gathering: asyncio.Task[Answers] | None = None
        self._gathered_until = 0.0

    async def snapshots(self) -> Answers:
        """Returns the statistics of every replica; concurrent and frequent calls share one collection.

        Otherwise any client that scrapes could keep every replica busy.
        """
        loop = asyncio.get_running_loop()
        if self._gathering is None or (self._gathering.done() and loop.time() > self._gathered_until):
            self._gathering = loop.create_task(self._ask("stats"))
            self._gathered_until = loop.time() + METRICS_EVERY_S
        return await asyncio.shield(self._gathering)

    async def statistics(self, name: str = "", version: int | None = None) -> list[ModelStatistics]:
        """Returns the statistics of the pool.

        Args:
            name: name of a model; empty: all models.
            version: version of the model; None: all versions.

        Raises:
            NotFound: the pool has no such model or version.
        """
        if name:
            self._manager.find(name, version)
        pooled = merge_pool(await self._ask("stats"))
        return [
            model_statistics(snapshot)
            for (model, number), snapshot in sorted(pooled.items())
            if name in ("", model) and version in (None, number)
        ]

    async def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """Returns the index of the pool.

        Args:
            ready_only: omits every state but READY.
        """
        entries: dict[tuple[str, str], IndexEntry] = {}
        for replica in await self._ask("index", "ready" if ready_only else ""):
            for entry in (IndexEntry(**each) for each in replica):
                # A replica that cannot serve it takes precedence, so that operators see it.
                known = entries.get((entry.name, entry.version))
                if known is None or known.state == "READY":
                    entries[entry.name, entry.version] = entry
        return list(entries.values())

    async def load(self, name: str, parameters: Any) -> None:
        """Loads a model in all replicas.

        Args:
            name: name of the model.
            parameters: as received; see `load_parameters.read_load`.

        Raises:
            MaasError: the request is refused, or the model cannot be loaded.
        """
        try:
            wanted = read_load(name, parameters)
            await self._manager.load(name, max_batch_size=wanted.max_batch_size)
        except MaasError as error:  # the text begins like Triton's: its clients look for the words
            error.args = (f"failed to load {name!r}, {error}", *error.args[1:])
            raise
        await self._refresh()

    async def unload(self, name: str, parameters: Any) -> None:
        """Unloads a model in all replicas; raises as `load`."""
        read_unload(parameters)
        await self._manager.unload(name)
        await self._refresh()

    async def ask_here(self, question: str, argument: str = "") -> Any:
        """Returns this replica's `stats` or `index`, as plain JSON values, or the index after a `refresh`."""
        match question:
            case "stats":
                return self._manager.stats.snapshot()
            case "index":
                return self._manager.index(ready_only=argument == "ready")
            case "refresh":
                await self._manager.refresh()
                return self._manager.index(ready_only=False)
        raise BadRequest(f"unknown call {question[:40]!r}")

    async def _ask(self, question: str, argument: str = "") -> Answers:
        if self._peers is None:
            return Answers([await self.ask_here(question, argument)])
        return await self._peers.ask(question, argument)

    async def _refresh(self) -> None:
        if num_silent := (await self._ask("refresh")).num_silent:
            raise DeadlineExceeded(f"{num_silent} replicas of the pool did not confirm the request in time; retry")
