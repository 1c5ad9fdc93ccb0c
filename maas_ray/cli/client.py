"""A client of the Open Inference Protocol v2 over JSON, for `maas-ray predict`. Knows nothing of the server's inside."""

from dataclasses import dataclass
from math import prod
from typing import Any

import requests

from maas_ray.addresses import host_of, is_loopback
from maas_ray.errors import ClusterError, NotFound, RequestError


@dataclass(frozen=True)
class Input:
    """One input of a model, as its metadata says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Of one row, without the batch dimension."""

    @property
    def is_scalar(self) -> bool:
        """Whether a row has one value here."""
        return prod(self.shape) == 1


class ModelClient:
    """One served model.

    Args:
        url: base URL of the pool.
        model: its name.
        version: a version; None leaves the choice to the pool.
        timeout_s: longest wait for one answer.
        through_proxy: whether the proxy of the environment (HTTP_PROXY) may be used; never for loopback.

    Raises:
        ClusterError: nothing answers at `url`.
        NotFound: the pool does not serve this model or version.
    """

    def __init__(
        self, url: str, model: str, *, version: int | None = None, timeout_s: float = 30.0, through_proxy: bool = True
    ) -> None:
        self._base = f"{url.rstrip('/')}/v2/models/{model}" + (f"/versions/{version}" if version else "")
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.trust_env = through_proxy and not is_loopback(host_of(url))
        metadata = self._call("GET", "", None)
        self.inputs = tuple(
            Input(tensor["name"], tensor["datatype"], tuple(tensor["shape"][1:])) for tensor in metadata["inputs"]
        )
        self.lineage: dict[str, str] = {}
        """The headers of the last answer that lead back to the version and the run."""

    def predict(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Predicts rows with one request.

        Args:
            rows: for each row the value, or the flat list of values, of each input by name; None is a missing value.

        Returns:
            For each row the value, or list of values, of each output by name.

        Raises:
            RequestError: the model refuses the request; the message is the server's.
        """
        tensors = [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": [len(rows), *tensor.shape],
                "data": [value for row in rows for value in _flat(row[tensor.name])],
            }
            for tensor in self.inputs
        ]
        answer = self._call("POST", "/infer", {"inputs": tensors})
        outputs = {tensor["name"]: _cut(tensor["data"], len(rows)) for tensor in answer["outputs"]}
        return [{name: values[index] for name, values in outputs.items()} for index in range(len(rows))]

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = self._session.request(method, self._base + path, json=body, timeout=self._timeout_s)
        except requests.RequestException as error:
            raise ClusterError(f"nothing answers at {self._base}: {error}; is the model served there?") from error
        self.lineage = {name.lower(): value for name, value in response.headers.items() if "x-maas" in name.lower()}
        if response.ok:
            return response.json()
        try:
            message = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            message = response.text.strip()[:500]
        kind = NotFound if response.status_code == 404 else RequestError
        raise kind(f"{self._base} answered {response.status_code}: {message}")


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


def _cut(data: list[Any], num_rows: int) -> list[Any]:
    """Row-major values -> one value, or one list, per row."""
    flat = _flat(data)
    size = len(flat) // num_rows
    return flat if size == 1 else [flat[start : start + size] for start in range(0, len(flat), size)]
