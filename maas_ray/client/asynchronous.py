"""`AsyncClient`, the asyncio client of a pool."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from maas_ray.addresses import host_of, is_loopback
from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.client.exchange import NUM_CONNECTIONS, Deadline, Exchange, ModelRequests, Response
from maas_ray.client.files import read_input_file
from maas_ray.client.messages import read_response
from maas_ray.client.prediction import Prediction, join_predictions
from maas_ray.client.retries import Retries

if TYPE_CHECKING:
    import aiohttp


class AsyncClient:
    """The asyncio counterpart of `Client`, with the same arguments and errors; use it with `async with`.

    Args:
        url: base URL of the pool, such as `http://127.0.0.1:8000`.
        timeout_s: timeout of one call, including retries.
        headers: headers of every request.
        retries: retry policy.
        through_proxy: whether the proxy of the environment (HTTP_PROXY) may be used; never for loopback.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        retries: Retries = Retries(),  # noqa: B008 (frozen)
        through_proxy: bool = True,
    ) -> None:
        self._requests = ModelRequests(url, timeout_s, retries)
        self.url = self._requests.url
        self._headers = dict(headers or {})
        self._trusts_env = through_proxy and not is_loopback(host_of(url))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def inputs(self, model: str, version: int | None = None) -> tuple[Tensor, ...]:
        """The inputs of a model, from its metadata, which is requested once. Same errors as `Client.inputs`."""
        return (await self.describe(model, version)).inputs

    async def describe(self, model: str, version: int | None = None) -> ModelDescription:
        """The description of a model, from its metadata, which is requested once. Same errors as `Client.inputs`."""
        return await self._describe(model, version, self._requests.deadline())

    async def predict(
        self, model: str, data: Any, *, version: int | None = None, timeout_s: float | None = None
    ) -> Prediction:
        """Predicts rows; arguments and errors are those of `Client.predict`."""
        deadline = self._requests.deadline(timeout_s)
        description = await self._describe(model, version, deadline)
        if isinstance(data, Path):
            rows = await asyncio.to_thread(read_input_file, data, description)
            parts = [await self.predict(model, batch, version=version, timeout_s=timeout_s) for batch in rows.batches()]
            return join_predictions(parts)
        response = await self._send(self._requests.inference(model, version, description, data, deadline))
        return read_response(response.headers, response.body, description)

    async def _describe(self, model: str, version: int | None, deadline: Deadline) -> ModelDescription:
        description = self._requests.known(model, version)
        if description is None:
            response = await self._send(self._requests.metadata(model, version, deadline))
            description = self._requests.received_metadata(model, version, response)
        return description

    async def _send(self, exchange: Exchange) -> Response:
        import aiohttp

        session = self._open_session()
        while True:
            limit = aiohttp.ClientTimeout(total=exchange.begin_attempt())
            try:
                async with session.request(
                    exchange.method, exchange.url, data=exchange.body, headers=exchange.headers, timeout=limit
                ) as found:
                    response = Response(found.status, found.headers, await found.read())
            except TimeoutError as failure:
                raise exchange.timed_out() from failure
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as failure:
                await asyncio.sleep(exchange.broken(failure))
                continue
            except (aiohttp.ClientError, ValueError) as failure:
                raise exchange.failed(failure) from failure
            pause_s = exchange.received(response)
            if pause_s is None:
                return response
            await asyncio.sleep(pause_s)

    def _open_session(self) -> "aiohttp.ClientSession":
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=NUM_CONNECTIONS)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, trust_env=self._trusts_env, auto_decompress=True
            )
        return self._session
