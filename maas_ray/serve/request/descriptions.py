"""Descriptions of the server and its models, as one replica knows them. Independent of protocols."""

import asyncio
from typing import Any, NamedTuple

from maas_ray.errors import MaasError
from maas_ray.serve.models.manager import Loaded, ModelManager
from maas_ray.serve.request.head import Header
from maas_ray.serve.wire.metadata import ModelConfig, ModelMetadata, ServerMetadata, model_config, model_metadata


class ModelReadiness(NamedTuple):
    """Whether a model accepts requests."""

    name: str
    is_ready: bool
    problems: list[str]
    """Why it does not serve what it should; empty if it does."""
    headers: tuple[Header, ...]
    """Headers of the version; empty if it is not in memory."""


class Descriptions:
    """Answers from the models of one replica.

    Args:
        manager: models.
    """

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager

    @property
    def is_ready(self) -> bool:
        """Whether the replica accepts requests."""
        return self._manager.is_ready

    def server(self) -> ServerMetadata:
        """Returns the metadata of the server."""
        return ServerMetadata(self._manager.spec.server_name)

    def models(self) -> list[str]:
        """Returns the names of the served models."""
        return self._manager.names

    def versions(self, name: str) -> list[int]:
        """Returns the served versions of a model.

        Raises:
            NotFound: the pool has no such model.
        """
        self._manager.find(name)
        return self._manager.versions(name)

    def readiness(self, name: str, version: int | None) -> ModelReadiness:
        """Returns whether a model accepts requests.

        A model that is not in memory is loaded by its first request; it is ready unless its load is known to fail.

        Raises:
            NotFound: the pool has no such model or version.
        """
        found = self._manager.find(name, version)
        problems = self._manager.problems(name)
        headers = found.headers if found is not None else ()
        return ModelReadiness(name, found is not None or not problems, problems, headers)

    async def metadata(
        self, name: str, version: int | None, deadline: float
    ) -> tuple[ModelMetadata, tuple[Header, ...]]:
        """Returns the metadata of a model, and the headers of the version.

        Raises:
            NotFound: the pool has no such model or version.
            MaasError: it could not be loaded, or not in time.
        """
        loaded = await self._load(name, version, deadline)
        parameters: dict[str, Any] = {"run": loaded.version.run, "version": str(loaded.version.version)}
        if problems := self._manager.problems(name):
            parameters["problems"] = problems
        versions = self._manager.versions(name) if version is None else [version]
        return model_metadata(name, versions, loaded.info, parameters), loaded.headers

    async def config(self, name: str, version: int | None, deadline: float) -> tuple[ModelConfig, tuple[Header, ...]]:
        """Returns the configuration of a model, and the headers of the version; raises as `metadata`."""
        loaded = await self._load(name, version, deadline)
        config = model_config(
            name,
            self._manager.versions(name),
            loaded.info,
            max_batch_size=loaded.batcher.max_batch_size,
            max_delay_us=round(self._manager.spec.batching.max_delay_ms * 1000),
        )
        return config, loaded.headers

    def headers(self, name: str, version: int | None) -> tuple[Header, ...]:
        """Returns `x-maas-run` and `x-maas-version` of a version; empty if it is not in memory."""
        try:
            found = self._manager.find(name, version) if name else None
        except MaasError:
            return ()
        return found.headers if found is not None else ()

    async def _load(self, name: str, version: int | None, deadline: float) -> Loaded:
        found = self._manager.find(name, version)
        if found is not None:
            return found
        future: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()

        def ready(loaded: Loaded | None, error: MaasError | None) -> None:
            if future.done():
                return
            if loaded is not None:
                future.set_result(loaded)
            else:
                future.set_exception(error or MaasError(f"model {name!r} was not loaded"))

        waiting = self._manager.load_soon(name, version, deadline, ready)
        try:
            return await future
        finally:
            waiting.cancel()
