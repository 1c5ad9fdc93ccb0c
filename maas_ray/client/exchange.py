"""The requests to a pool's models, and what follows each response or failure. Opens no connection and never sleeps."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

from maas_ray.client.description import ModelDescription, read_description
from maas_ray.client.messages import read_error, write_request
from maas_ray.client.retries import Retries
from maas_ray.errors import ClusterError, DeadlineExceeded, MaasError

NUM_CONNECTIONS = 32
"""Largest number of connections that a client keeps open."""


class Response(NamedTuple):
    """A response of the server, as a transport received it."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Deadline:
    """The end of one call, which may need two requests: for the model's metadata and for the inference."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._at_s - time.monotonic()


@dataclass
class Exchange:
    """One request with its attempts, which a transport sends.

    The transport calls `begin_attempt` and sends the request. It passes a response to `received` and a broken connection
    to `broken`, pauses for the seconds that they return, and begins again; it raises `timed_out` after a timeout.
    """

    method: str
    url: str
    deadline: Deadline
    retries: Retries
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    attempt: int = 0

    def begin_attempt(self) -> float:
        """Returns the seconds that the attempt may take, which its headers tell the server.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        left_s = self.deadline.left_s()
        if left_s <= 0:
            raise self.timed_out()
        self.attempt += 1
        self.headers["x-request-timeout-ms"] = str(max(1, int(left_s * 1000)))
        return left_s

    def received(self, response: Response) -> float | None:
        """Returns None if the response has the result, else the seconds to pause before the next attempt.

        Raises:
            MaasError: the error in the response, if no further attempt follows.
        """
        if response.status < 400:
            return None
        error = read_error(self.url, *response)
        return self._pause_s(error, error)

    def broken(self, failure: Exception) -> float:
        """Returns the seconds to pause after a refused or broken connection.

        Raises:
            ClusterError: no further attempt follows.
        """
        missing = ClusterError(f"nothing answers at {self.url}: {failure}; is the model served there?")
        missing.__cause__ = failure
        return self._pause_s(None, missing)

    def timed_out(self) -> DeadlineExceeded:
        """The error of an attempt without a response before the deadline."""
        return DeadlineExceeded(
            f"no answer from {self.url} within {self.deadline.timeout_s:g} s; raise timeout_s or send fewer rows"
        )

    def failed(self, failure: Exception) -> ClusterError:
        """The error of a request that could not be sent and is not retried, such as for an invalid URL."""
        return ClusterError(f"the request to {self.url} failed: {failure}")

    def _pause_s(self, answered: MaasError | None, last: MaasError) -> float:
        pause_s = self.retries.pause_s(self.attempt, answered, self.deadline.left_s())
        if pause_s is None:
            raise last
        return pause_s


class ModelRequests:
    """Creates the exchanges of a client and keeps the descriptions of the models that it has asked for.

    Args:
        url: base URL of the pool.
        timeout_s: timeout of a call that has none of its own.
        retries: retry policy.
    """

    def __init__(self, url: str, timeout_s: float, retries: Retries) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._models: dict[tuple[str, int | None], ModelDescription] = {}

    def deadline(self, timeout_s: float | None = None) -> Deadline:
        """The deadline of a call that begins now."""
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def known(self, model: str, version: int | None) -> ModelDescription | None:
        """The description of a model whose metadata has been received."""
        return self._models.get((model, version))

    def metadata(self, model: str, version: int | None, deadline: Deadline) -> Exchange:
        """The request for a model's metadata."""
        return Exchange("GET", self._model_url(model, version), deadline, self._retries)

    def received_metadata(self, model: str, version: int | None, response: Response) -> ModelDescription:
        """Reads and keeps the description of a model.

        Raises:
            ClusterError: the response does not follow the protocol.
        """
        description = self._models[model, version] = read_description(response.body)
        return description

    def inference(
        self, model: str, version: int | None, description: ModelDescription, data: Any, deadline: Deadline
    ) -> Exchange:
        """The inference request, whose attempts have one request id.

        Raises:
            BadRequest: the data does not match the inputs.
        """
        body, headers = write_request(description.inputs, data)
        headers["x-request-id"] = uuid.uuid4().hex
        return Exchange("POST", f"{self._model_url(model, version)}/infer", deadline, self._retries, headers, body)

    def _model_url(self, model: str, version: int | None) -> str:
        path = f"{self.url}/v2/models/{quote(model, safe='')}"
        return path if version is None else f"{path}/versions/{version}"
