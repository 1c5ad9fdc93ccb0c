"""`Client`, the blocking client of a pool."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
from requests.adapters import HTTPAdapter

from maas_ray.addresses import host_of, is_loopback
from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.client.exchange import NUM_CONNECTIONS, Deadline, Exchange, ModelRequests, Response
from maas_ray.client.files import read_input_file
from maas_ray.client.messages import read_response
from maas_ray.client.prediction import Prediction, join_predictions
from maas_ray.client.retries import Retries


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
        self._requests = ModelRequests(url, timeout_s, retries)
        self.url = self._requests.url
        self._session = requests.Session()
        self._session.trust_env = through_proxy and not is_loopback(host_of(url))
        self._session.headers.update(headers or {})
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=NUM_CONNECTIONS)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

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
        return self.describe(model, version).inputs

    def describe(self, model: str, version: int | None = None) -> ModelDescription:
        """The description of a model, from its metadata, which is requested once; raises as `inputs`."""
        return self._describe(model, version, self._requests.deadline())

    def predict(
        self, model: str, data: Any, *, version: int | None = None, timeout_s: float | None = None
    ) -> Prediction:
        """Predicts rows with one request, or the rows of a file with as many as it needs.

        Args:
            model: name of the model.
            data: rows as a list of mappings, arrays by input name, a DataFrame, or one array; see `write_request`. A
                `Path` of a file, which is read as the model's training data was; see `read_input_file`.
            version: version of the model; None: the pool chooses it.
            timeout_s: timeout of this call (of each request of a file), including retries.

        Raises:
            BadRequest: the data does not match the model's inputs.
            DataError: the file cannot be read, or does not match the model's inputs.
            NotFound: the pool does not serve this model or version.
            Overloaded: the pool was overloaded in every attempt.
            DeadlineExceeded: the timeout passed without a response.
            ClusterError: nothing answers at the URL.
        """
        deadline = self._requests.deadline(timeout_s)
        description = self._describe(model, version, deadline)
        if isinstance(data, Path):
            batches = read_input_file(data, description).batches()
            return join_predictions(
                [self.predict(model, batch, version=version, timeout_s=timeout_s) for batch in batches]
            )
        response = self._send(self._requests.inference(model, version, description, data, deadline))
        return read_response(response.headers, response.body, description)

    def _describe(self, model: str, version: int | None, deadline: Deadline) -> ModelDescription:
        description = self._requests.known(model, version)
        if description is None:
            response = self._send(self._requests.metadata(model, version, deadline))
            description = self._requests.received_metadata(model, version, response)
        return description

    def _send(self, exchange: Exchange) -> Response:
        while True:
            left_s = exchange.begin_attempt()
            try:
                found = self._session.request(
                    exchange.method, exchange.url, data=exchange.body, headers=exchange.headers, timeout=left_s
                )
            except requests.Timeout as failure:
                raise exchange.timed_out() from failure
            except requests.ConnectionError as failure:
                time.sleep(exchange.broken(failure))
                continue
            except requests.RequestException as failure:
                raise exchange.failed(failure) from failure
            response = Response(found.status_code, found.headers, found.content)
            pause_s = exchange.received(response)
            if pause_s is None:
                return response
            time.sleep(pause_s)
