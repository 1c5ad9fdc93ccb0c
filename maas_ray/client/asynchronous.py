"""`AsyncClient`, the asyncio client of a pool."""

import asyncio
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from maas_ray.addresses import host_of, is_loopback
from maas_ray.client.messages import (
    Prediction,
    Tensor,
    read_error,
    read_metadata,
    read_response,
    write_request,
)
from maas_ray.client.paths import model_url
from maas_ray.client.retries import Retries
from maas_ray.client.synchronous import NUM_CONNECTIONS
from maas_ray.errors import ClusterError, DeadlineExceeded

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
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = dict(headers or {})
        self._retries = retries
        self._trusts_env = through_proxy and not is_loopback(host_of(url))
        self._session: aiohttp.ClientSession | None = None
        self._inputs: dict[tuple[str, int | None], tuple[Tensor, ...]] = {}

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
        known = self._inputs.get((model, version))
        if known is None:
            import json

            _, body = await self._call("GET", model_url(self.url, model, version), None, {}, self._timeout_s)
            known = self._inputs[model, version] = read_metadata(json.loads(body))
        return known

    async def predict(
        self, model: str, data: Any, *, version: int | None = None, timeout_s: float | None = None
    ) -> Prediction:
        """Predicts rows with one request; arguments and errors are those of `Client.predict`."""
        body, headers = write_request(await self.inputs(model, version), data)
        headers["x-request-id"] = uuid.uuid4().hex
        url = f"{model_url(self.url, model, version)}/infer"
        found, content = await self._call(
            "POST", url, body, headers, self._timeout_s if timeout_s is None else timeout_s
        )
        return read_response(found, content)

    async def _call(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> tuple[Mapping[str, str], bytes]:
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=NUM_CONNECTIONS)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, trust_env=self._trusts_env, auto_decompress=True
            )
        deadline = time.monotonic() + timeout_s
        attempt = 0
        while True:
            attempt += 1
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(
                    f"no answer from {url} within {timeout_s:g} s; raise timeout_s or send fewer rows"
                )
            headers["x-request-timeout-ms"] = str(max(1, int(left_s * 1000)))
            error = None
            limit = aiohttp.ClientTimeout(total=left_s)
            try:
                async with self._session.request(method, url, data=body, headers=headers, timeout=limit) as response:
                    content = await response.read()
                    if response.ok:
                        return response.headers, content
                    reason: Exception
                    reason = error = read_error(url, response.status, response.headers, content)
            except TimeoutError as failure:
                raise DeadlineExceeded(f"no answer from {url} within {timeout_s:g} s") from failure
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as failure:
                reason = failure
            except (aiohttp.ClientError, ValueError) as failure:
                raise ClusterError(f"the request to {url} failed: {failure}") from failure
            pause_s = self._retries.pause_s(attempt, error, deadline - time.monotonic())
            if pause_s is None:
                if error is not None:
                    raise error
                raise ClusterError(f"nothing answers at {url}: {reason}; is the model served there?") from reason
            await asyncio.sleep(pause_s)
