"""`Client`, the blocking client of a pool."""

import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import requests
from requests.adapters import HTTPAdapter

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
from maas_ray.errors import ClusterError, DeadlineExceeded

NUM_CONNECTIONS = 32


class Client:
    """Client of the models of one pool over HTTP. It reuses connections and can be shared by threads.

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
        self._retries = retries
        self._session = requests.Session()
        self._session.trust_env = through_proxy and not is_loopback(host_of(url))
        self._session.headers.update(headers or {})
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=NUM_CONNECTIONS)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._inputs: dict[tuple[str, int | None], tuple[Tensor, ...]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections."""
        self._session.close()

    def inputs(self, model: str, version: int | None = None) -> tuple[Tensor, ...]:
        """The inputs of a model, from its metadata, which is requested once.

        Raises:
            NotFound: the pool does not serve this model or version.
            ClusterError: nothing answers at the URL.
        """
        known = self._inputs.get((model, version))
        if known is None:
            response = self._call("GET", model_url(self.url, model, version), None, {}, self._timeout_s)
            known = self._inputs[model, version] = read_metadata(response.json())
        return known

    def predict(
        self, model: str, data: Any, *, version: int | None = None, timeout_s: float | None = None
    ) -> Prediction:
        """Predicts rows with one request.

        Args:
            model: name of the model.
            data: rows as a list of mappings, arrays by input name, a DataFrame, or one array; see `write_request`.
            version: version of the model; None: the pool chooses it.
            timeout_s: timeout of this call, including retries.

        Raises:
            BadRequest: the data does not match the model's inputs.
            NotFound: the pool does not serve this model or version.
            Overloaded: the pool was overloaded in every attempt.
            DeadlineExceeded: the timeout passed without a response.
            ClusterError: nothing answers at the URL.
        """
        body, headers = write_request(self.inputs(model, version), data)
        headers["x-request-id"] = uuid.uuid4().hex
        url = f"{model_url(self.url, model, version)}/infer"
        response = self._call("POST", url, body, headers, self._timeout_s if timeout_s is None else timeout_s)
        return read_response(response.headers, response.content)

    def _call(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> requests.Response:
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
            try:
                response = self._session.request(method, url, data=body, headers=headers, timeout=left_s)
            except requests.Timeout as failure:
                raise DeadlineExceeded(f"no answer from {url} within {timeout_s:g} s: {failure}") from failure
            except requests.ConnectionError as failure:
                reason: Exception = failure
            except requests.RequestException as failure:
                raise ClusterError(f"the request to {url} failed: {failure}") from failure
            else:
                if response.ok:
                    return response
                reason = error = read_error(url, response.status_code, response.headers, response.content)
            pause_s = self._retries.pause_s(attempt, error, deadline - time.monotonic())
            if pause_s is None:
                if error is not None:
                    raise error
                raise ClusterError(f"nothing answers at {url}: {reason}; is the model served there?") from reason
            time.sleep(pause_s)
