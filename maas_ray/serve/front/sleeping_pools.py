"""Responses for a pool scaled to zero that start no replica: health, metrics, and data of the registry and the store.

Only inference and loading start a replica. Independent of Ray and of sockets.
"""

from maas_ray.bundle.format import load_info
from maas_ray.errors import MaasError, NotFound
from maas_ray.registry.models import Registry, Version
from maas_ray.serve.http import json_documents
from maas_ray.serve.http.routes import json_reply
from maas_ray.serve.http.scrape import scrape
from maas_ray.serve.models.desired_state import DesiredState
from maas_ray.serve.models.references import ResolvedReference, resolve_all
from maas_ray.serve.request.head import Head, Route
from maas_ray.serve.request.response import Reply
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.serve.wire.metadata import ServerMetadata, model_config, model_metadata
from maas_ray.store.objects import ObjectStore

ANSWERED = frozenset(
    {"live", "ready", "server", "metrics", "models", "stats", "index", "model", "model_ready", "versions", "config"}
)
"""Routes that are answered here. All others need a replica: inference, loading, and unloading, on which the replicas of
a pool agree."""
SLEEPS = "not in memory: the pool is scaled to zero, its next request starts a replica"


class Asleep:
    """Responses of one pool.

    Args:
        store: store of the registry and the bundles; read in this thread.
        spec: spec of the pool.
        pool: name of the pool.
    """

    def __init__(self, store: ObjectStore, spec: ServingSpec, pool: str) -> None:
        self._store = store
        self._spec = spec
        self._pool = pool
        self._registry = Registry(store)
        self._desired_state = DesiredState(store, pool)

    def answer(self, head: Head, body: bytes = b"") -> Reply:
        """Returns the response of every route that starts no replica.

        Raises:
            NotFound: no such model or version in this pool.
            MaasError: the store cannot be read.
        """
        route = head.route
        match route.name:
            case "live":
                return json_reply({"live": True})
            case "ready":
                return json_reply({"ready": True, "asleep": True})
            case "server":
                return json_reply(json_documents.server_metadata(ServerMetadata(self._spec.server_name)))
            case "metrics":
                return scrape(head.headers, [], pool=self._pool)
            case "models":
                return json_reply(
                    {"models": list(dict.fromkeys(reference.spec.name for reference in self._references()))}
                )
            case "stats":
                if route.model:
                    self._find(route)
                return json_reply({"model_stats": []})
            case "index":
                return json_reply(self._index(body))
        return self._about_model(route)

    def _about_model(self, route: Route) -> Reply:
        found, versions = self._find(route)
        headers = (
            (b"x-maas-run", found.run.encode()),
            (b"x-maas-version", str(found.version).encode()),
        )
        if route.name == "model_ready":
            return json_reply({"name": route.model, "ready": True, "asleep": True}, headers)
        if route.name == "versions":
            return json_reply({"name": route.model, "versions": [str(number) for number in versions]})
        info = load_info(self._store, found.bundle)
        if route.name == "config":
            batching = self._spec.batching
            config = model_config(
                route.model,
                versions,
                info,
                max_batch_size=batching.max_batch_size,
                max_delay_us=round(batching.max_delay_ms * 1000),
            )
            return json_reply(json_documents.model_config(config), headers)
        parameters = {"run": found.run, "version": str(found.version)}
        shown = versions if route.version is None else [route.version]
        metadata = model_metadata(route.model, shown, info, parameters)
        return json_reply(json_documents.model_metadata(metadata), headers)

    def _references(self) -> list[ResolvedReference]:
        desired = self._desired_state.models() if self._spec.model_control == "explicit" else {}
        return resolve_all(self._registry, self._spec.models, desired)

    def _find(self, route: Route) -> tuple[Version, list[int]]:
        """Returns the version in a route, and all versions of its model in the pool."""
        references = [reference for reference in self._references() if reference.spec.name == route.model]
        if not references:
            raise NotFound(f"this pool serves no model {route.model!r}; GET v2/models lists its models")
        named = [reference.names for reference in references if isinstance(reference.names, Version)]
        wanted = [version for version in named if route.version in (None, version.version)]
        if wanted:
            return wanted[0], sorted({version.version for version in named})
        if not named and isinstance(references[0].names, MaasError):
            raise references[0].names
        raise NotFound(f"this pool does not serve version {route.version} of model {route.model!r}")

    def _index(self, body: bytes) -> list[dict[str, str]]:
        ready_only = b'"ready"' in body and b"true" in body
        entries = []
        for reference in self._references():
            name = reference.spec.name
            if isinstance(reference.names, Version):
                entries.append(
                    {"name": name, "version": str(reference.names.version), "state": "READY", "reason": SLEEPS}
                )
            elif not ready_only:
                entries.append({"name": name, "version": "", "state": "UNAVAILABLE", "reason": str(reference.names)})
        return entries
