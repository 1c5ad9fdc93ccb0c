"""A client of the Ray dashboard's REST API. Needs no Ray in this process."""

from typing import Any

import requests

from maas_ray.errors import ClusterError


class Dashboard:
    """The REST API of one cluster.

    Args:
        url: such as `http://127.0.0.1:8265`.
        token: the cluster's token; None if authentication is off.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # a cluster's address needs no proxy
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def get(self, path: str, timeout_s: float = 10.0) -> Any:
        """The JSON document at `path`. Raises `ClusterError` if there is no answer, or its status is not 2xx."""
        return self._request("GET", path, timeout_s).json()

    def version(self, timeout_s: float = 10.0) -> str:
        """Ray's version; an answer also proves that the token is valid."""
        return str(self.get("/api/version", timeout_s)["ray_version"])

    def http_address(self, timeout_s: float = 10.0) -> tuple[str, int] | None:
        """Configured HTTP host and port of Ray Serve; None if Serve does not run."""
        options = self.get("/api/serve/applications/", timeout_s).get("http_options")
        return (str(options["host"]), int(options["port"])) if options else None

    def applications(self, timeout_s: float = 10.0) -> dict[str, dict[str, Any]]:
        """Ray Serve's applications by name; empty if Serve does not run."""
        return dict(self.get("/api/serve/applications/", timeout_s).get("applications") or {})

    def proxies(self, timeout_s: float = 10.0) -> list[str]:
        """Addresses of the nodes with an HTTP front."""
        found = self.get("/api/serve/applications/", timeout_s).get("proxies") or {}
        return sorted({str(proxy["node_ip"]) for proxy in found.values() if proxy.get("node_ip")})

    def shutdown_serve(self, timeout_s: float) -> None:
        """Ends all Serve applications, whose replicas first answer accepted requests. Returns when all have ended."""
        self._request("DELETE", "/api/serve/applications/", timeout_s)

    def _request(self, method: str, path: str, timeout_s: float) -> requests.Response:
        try:
            response = self._session.request(method, self._url + path, headers=self._headers, timeout=timeout_s)
        except requests.RequestException as error:
            raise ClusterError(f"the Ray dashboard {self._url} did not answer {method} {path}: {error}") from error
        if response.status_code in (401, 403):
            raise ClusterError(f"the Ray dashboard {self._url} rejected the token; check RAY_AUTH_TOKEN_PATH")
        if not response.ok:
            detail = response.text.strip().splitlines()[:1]
            raise ClusterError(f"the Ray dashboard {self._url} answered {response.status_code} to {path}: {detail}")
        return response
