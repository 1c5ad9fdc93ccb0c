"""Pools of replicas from Python: functions that deploy them, and the handle of a pool."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maas_ray.api.clusters import require_connection
from maas_ray.api.specs import read_spec
from maas_ray.errors import NotFound, SpecError

if TYPE_CHECKING:
    from maas_ray.client import AsyncClient, Client
    from maas_ray.serve.deploy.state import PoolStatus
    from maas_ray.serve.spec.serve import ServeSpec


class Pool:
    """A deployed pool.

    Attributes:
        name: name of the pool.
        url: base URL of the pool, reachable from this machine.
        unserved: models that the pool could not load at its deployment, each with the reason.
    """

    def __init__(self, name: str, url: str, unserved: tuple[str, ...] = ()) -> None:
        self.name = name
        self.url = url
        self.unserved = unserved

    def __repr__(self) -> str:
        return f"Pool({self.name!r}, url={self.url!r})"

    @property
    def status(self) -> "PoolStatus":
        """The current state of the pool in Ray Serve.

        Raises:
            NotFound: the pool is no longer deployed.
        """
        from maas_ray.serve.deploy.pool import status

        require_connection()
        found = status([self.name])
        if not found:
            raise NotFound(f"pool {self.name!r} is not deployed on this cluster")
        return found[0]

    def client(self, **options: Any) -> "Client":
        """Returns a client of this pool; `options` are those of `Client`."""
        from maas_ray.client import Client

        return Client(self.url, **options)

    def async_client(self, **options: Any) -> "AsyncClient":
        """Returns an asyncio client of this pool; `options` are those of `AsyncClient`."""
        from maas_ray.client import AsyncClient

        return AsyncClient(self.url, **options)

    def delete(self, timeout_s: float = 120.0) -> None:
        """Ends the pool; requests in progress are answered first."""
        from maas_ray.serve.deploy.pool import undeploy

        require_connection()
        undeploy([self.name], timeout_s=timeout_s)


def serve(
    spec: "ServeSpec | Mapping[str, Any] | str | Path",
    overrides: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Pool:
    """Deploys a spec with one pool and returns once the pool answers over HTTP; see `serve_all`.

    Raises:
        SpecError: the spec is invalid, or has several pools.
    """
    from maas_ray.serve.spec.serve import ServeSpec

    loaded = read_spec(ServeSpec, spec, overrides)
    if len(loaded.pools) != 1:
        names = ", ".join(pool.name for pool in loaded.pools)
        raise SpecError(f"serve deploys one pool, but the spec has {len(loaded.pools)} ({names}); use serve_all")
    (pool,) = serve_all(loaded, timeout_s=timeout_s, on_progress=on_progress)
    return pool


def serve_all(
    spec: "ServeSpec | Mapping[str, Any] | str | Path",
    overrides: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[Pool]:
    """Deploys every pool of a spec on the connected cluster and returns once each answers over HTTP.

    Args:
        spec: a `ServeSpec`, a mapping of its fields, or the path of a YAML file. The default of `http.port` is the port
            of the local cluster.
        overrides: values by field path, such as `{"http.port": 8001}`.
        timeout_s: timeout without a further ready replica; None: `rollout.timeout_s` of each pool.
        on_progress: called with each line of progress.

    Raises:
        SpecError: the spec is invalid.
        ClusterError: this process is not connected, or a pool did not become healthy and was rolled back.
        ResourcesMissing: the cluster's resources are insufficient for a pool.
        NotFound: the registry does not contain the model, version or alias.
    """
    from maas_ray.addresses import http_url, reachable_host
    from maas_ray.cluster.node.state import load_state
    from maas_ray.serve.spec.serve import ServeSpec

    loaded = read_spec(ServeSpec, spec, overrides)
    require_connection()
    from maas_ray.serve.deploy.pool import deploy

    state = load_state(None)
    if state is not None and "port" not in loaded.http.model_fields_set:
        loaded = loaded.model_copy(update={"http": loaded.http.model_copy(update={"port": state.http_port})})
    found = deploy(loaded, timeout_s, on_progress or (lambda line: None))
    base = http_url(reachable_host(loaded.http.host), loaded.http.port)
    if loaded.http.tls is not None:
        base = base.replace("http://", "https://", 1)
    return [Pool(pool.name, f"{base}{pool.route_prefix.rstrip('/')}", pool.unserved) for pool in found]
