"""Serving table: the model references of a pool, and the version in memory that answers requests for each.

Changes are made without an await: a request sees the table before a change or after it.
"""

from collections.abc import Iterable

from maas_ray.errors import NotFound, Overloaded
from maas_ray.serve.models.cache import ModelCache
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.loader import ModelLoader
from maas_ray.serve.models.references import ModelReference, default_of
from maas_ray.serve.models.registry_reader import PoolReading
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.serve.telemetry.stats import ReplicaStats

MAX_NAMES = 20
"""Maximum number of names in a message."""


class ServingTable:
    """References of one replica's pool. A version in memory without a reference is retired.

    Args:
        loader: loads and releases the versions in memory.
        spec: memory budget and batch size.
        stats: counts evictions.
    """

    def __init__(self, loader: ModelLoader, spec: ServingSpec, stats: ReplicaStats) -> None:
        self.references: dict[tuple[str, int | str], ModelReference] = {}
        """References by name and version or alias; the first reference of a name serves URLs without a version."""
        self.defaults: dict[str, Loaded] = {}
        """Versions in memory that serve URLs without a version, by name. Always the same object."""
        self.unloaded: set[str] = set()
        """Names that a client has unloaded."""
        self.is_closed = False
        """Whether the replica is stopping, and no model is loaded any more."""
        self.cache = ModelCache(loader, spec, stats, self.is_pinned, self.withdraw)
        """Versions in memory."""
        self._by_name: dict[str, list[ModelReference]] = {}
        self._batch_sizes: dict[str, int] = {}
        self._max_batch_size = spec.batching.max_batch_size

    @property
    def names(self) -> list[str]:
        """Names of the served models, in memory or not."""
        return list(self._by_name)

    def of(self, name: str) -> list[ModelReference]:
        """Returns the references of a name; empty if the pool does not serve it."""
        return self._by_name.get(name, [])

    def reference(self, name: str, version: int | None) -> ModelReference:
        """Returns the reference for a name, or for one version of it, in memory or not.

        Raises:
            NotFound: the pool serves no such model or version; the message lists those it serves.
            Overloaded: the replica is stopping.
        """
        if self.is_closed:
            raise Overloaded("the replica is stopping; retry", 1.0)
        references = self.of(name)
        if not references:
            if name in self.unloaded:
                raise NotFound(f"{_unknown(name)}; it was unloaded from this pool; load it first")
            raise NotFound(f"{_unknown(name)}; this pool serves: {_listed(self._by_name) or 'none'}")
        if version is None:
            reference = default_of(references)
            if reference is None:
                raise NotFound(f"model {name!r} cannot be served: {references[0].problem}")
            return reference
        for reference in references:
            if reference.named is not None and version == (reference.serving or reference.named.version):
                return reference
        served = _listed(map(str, self.versions(name)))
        raise NotFound(f"{_unknown(name, version)}; this pool serves: {served}")

    def versions(self, name: str) -> list[int]:
        """Returns the served versions of a model, ascending, including those not in memory."""
        numbers = {
            reference.serving or (reference.named.version if reference.named else None) for reference in self.of(name)
        }
        return sorted(number for number in numbers if number is not None)

    def problems(self, name: str) -> list[str]:
        """Returns why references of this model do not serve the registry's version, or not as intended; else empty."""
        found = [reference.problem for reference in self.of(name) if reference.problem]
        return found + [
            loaded.batcher.problem
            for loaded in self.cache.loaded.values()
            if loaded.version.model == name and loaded.batcher.problem
        ]

    def update(self, reading: PoolReading) -> None:
        """Takes over what was read; models without a reference accept no more requests from now on."""
        requests = reading.desired.items()
        self.unloaded = {name for name, request in requests if not request.is_load}
        self._batch_sizes = {name: request.max_batch_size for name, request in requests if request.max_batch_size}
        for loaded in self.cache.loaded.values():
            self._resize(loaded)
        if self.is_closed:
            return
        references: dict[tuple[str, int | str], ModelReference] = {}
        names: dict[str, list[ModelReference]] = {}
        for resolved in reading.references:
            key = (resolved.spec.name, resolved.spec.ref)
            reference = self.references.get(key) or ModelReference(
                resolved.spec, resolved.is_listed, resolved.is_override
            )
            reference.note_reference(resolved)
            references[key] = reference
            names.setdefault(resolved.spec.name, []).append(reference)
        has_changed = list(references) != list(self.references)
        self.references, self._by_name = references, names
        if has_changed:
            for name in {name for name, _ in self.cache.loaded} | set(self.defaults):
                self._settle(name)

    def serve(self, reference: ModelReference, loaded: Loaded) -> None:
        """Directs the requests of a reference to a version in memory.

        Raises:
            NotFound: the reference is no longer in the table, so the version was retired.
        """
        self._resize(loaded)
        name = reference.spec.name
        is_current = self.references.get((name, reference.spec.ref)) is reference
        if is_current:
            reference.serving, reference.has_served = loaded.version.version, True
        self._settle(name)
        if not is_current:
            raise NotFound(f"model {name!r} was unloaded from this pool while it was loaded")

    def withdraw(self, loaded: Loaded) -> None:
        """Stops requests to a version in memory: the next request loads it again."""
        name = loaded.version.model
        for reference in self.of(name):
            if reference.serving == loaded.version.version:
                reference.serving = None
        self._settle(name)

    def is_pinned(self, loaded: Loaded) -> bool:
        """Whether a reference keeps a version in memory."""
        return any(
            reference.spec.pinned and reference.serving == loaded.version.version
            for reference in self.of(loaded.version.model)
        )

    def clear(self) -> None:
        """Drops all references; the versions remain in memory until the cache is closed."""
        self.references, self._by_name = {}, {}
        self.defaults.clear()

    def _settle(self, name: str) -> None:
        """Updates the version that serves requests for a name, and retires versions without a reference."""
        references = self.of(name)
        default = default_of(references)
        loaded = self.cache.loaded
        if default is not None and default.serving is not None:
            self.defaults[name] = loaded[name, default.serving]
        else:
            self.defaults.pop(name, None)
        used = {reference.serving for reference in references}
        for key in [key for key in loaded if key[0] == name and key[1] not in used]:
            self.cache.retire(key)

    def _resize(self, loaded: Loaded) -> None:
        """Sets a model's batch size to the one that a client requested, or to the pool's."""
        wanted = self._batch_sizes.get(loaded.version.model, self._max_batch_size)
        if loaded.batcher.max_batch_size != wanted:
            loaded.batcher.resize(wanted)


def _unknown(name: str, version: int | None = None) -> str:
    """Returns the error text with Triton's beginning: its clients look for these words."""
    return f"Request for unknown model: {name!r} {'' if version is None else f'version {version} '}is not found"


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:MAX_NAMES]) + (f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else "")
