"""Model references of a pool: resolves them in the registry, and remembers failed loads.

A reference comes from the spec (one model, or a pattern for many) or from a client's load request; a client's unload
request removes the references of a model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from maas_ray.display import get_logger
from maas_ray.errors import MaasError, NotFound
from maas_ray.registry.models import Model, Registry, Version, find_version
from maas_ray.serve.models.desired_state import DesiredModel
from maas_ray.serve.models.pending import Load
from maas_ray.serve.models.public_errors import for_callers, original
from maas_ray.serve.spec.pools import RefreshSpec, ServedModelSpec

log = get_logger(__name__)


class ResolvedReference(NamedTuple):
    """One reference as resolved in the registry; never a pattern."""

    spec: ServedModelSpec
    is_listed: bool
    """Whether the spec names this model itself, rather than by a pattern, or a client requested to load it."""
    is_override: bool
    """Whether a client requested this specific version or alias."""
    desired_number: int
    """Number of the client's load request; 0 if there is none."""
    names: Version | MaasError
    """Version that it names, or the error if there is none."""


@dataclass(eq=False)
class ModelReference:
    """One model reference of the pool: the version it names, the version it serves, and the reason if they differ."""

    spec: ServedModelSpec
    is_listed: bool = True
    is_override: bool = False
    desired_number: int = 0
    is_desired: bool = False
    """Whether a client has requested it and it has not been tried since."""
    named: Version | None = None
    """Version in the registry; None if there is none."""
    serving: int | None = None
    """Version in memory; None if there is none."""
    has_served: bool = False
    """Whether a version of it has been in memory."""
    fallback: Version | None = None
    """Previous version of its alias, which serves because the current one cannot be loaded."""
    problem: str | None = None
    """Why it does not serve the version in the registry; None if it does, or would with its next request."""
    error: MaasError | None = None
    """Error behind `problem`."""
    load: Load | None = None
    """Load in progress."""
    _failed: int | None = None
    _retry_at: float = 0.0
    _pause_s: float = 0.0

    def note_reference(self, resolved: ResolvedReference) -> None:
        """Updates it from the current state of the registry and the clients' requests."""
        if resolved.desired_number > self.desired_number:
            self.desired_number, self.is_desired, self._retry_at = resolved.desired_number, True, 0.0
        if isinstance(resolved.names, MaasError):
            if self.problem != str(resolved.names):
                log.warning("model %r: %s", self.spec.name, original(resolved.names))
            self.error, self.problem = resolved.names, str(resolved.names)
            return
        self.named = resolved.names
        if self.serving == self.named.version or self._failed != self.named.version:
            self.note_success()
        elif self.serving is None and self.error is not None and self.error.retryable:
            self._retry_at = 0.0  # the registry could be read, so the store is available again

    def is_due(self, version: int, now: float) -> bool:
        """Whether a version should be loaded now: it is not served, and did not fail recently."""
        return version != self.serving and (version != self._failed or now >= self._retry_at)

    def note_failure(self, version: int, error: MaasError, now: float, refresh: RefreshSpec) -> None:
        """Records that a version cannot be loaded; it is retried after a pause that doubles."""
        self._pause_s = min(max(2 * self._pause_s, refresh.poll_interval_s), refresh.max_backoff_s)
        self._failed, self._retry_at = version, now + self._pause_s
        self.error, self.problem = error, f"version {version} cannot be loaded: {error}"

    def note_success(self) -> None:
        """Clears earlier failures."""
        self.error, self.problem, self.fallback, self._failed, self._pause_s = None, None, None, None, 0.0

    def try_again(self) -> None:
        """Ends the pause after a failure."""
        self._retry_at = 0.0


def resolve_all(
    registry: Registry, specs: Sequence[ServedModelSpec], desired: Mapping[str, DesiredModel] | None = None
) -> list[ResolvedReference]:
    """Returns the current references of a pool, each once, from one read of the registry.

    The first reference of a name serves URLs without a version: a version or alias that a client requested, else the
    first one in the spec, else the match of a pattern.
    """
    return references_in(registry.models(), registry.uri, specs, desired or {})


def references_in(
    models: Mapping[str, Model], uri: str, specs: Sequence[ServedModelSpec], desired: Mapping[str, DesiredModel]
) -> list[ResolvedReference]:
    """As `resolve_all`, with a table that was read from the registry of the store `uri`."""
    found: dict[tuple[str, int | str], ResolvedReference] = {}
    for spec, is_listed, is_override in _expand(models, specs, desired):
        desired_model = desired.get(spec.name)
        if desired_model is not None and not desired_model.is_load:
            continue
        if (spec.name, spec.ref) not in found:
            names = _resolve(models, uri, spec)
            number = desired_model.number if desired_model is not None else 0
            found[spec.name, spec.ref] = ResolvedReference(spec, is_listed, is_override, number, names)
    return list(found.values())


def default_of(references: Sequence[ModelReference]) -> ModelReference | None:
    """Returns the reference of a name that serves URLs without a version; None if there is none.

    A version that a client requested takes over once it has been in memory: if it is broken, nothing changes.
    """
    named = [reference for reference in references if reference.named is not None]
    return next(
        (reference for reference in named if reference.has_served or not reference.is_override),
        named[0] if named else None,
    )


def check_reference(
    registry: Registry, name: str, desired: ServedModelSpec | None, specs: Sequence[ServedModelSpec]
) -> None:
    """Raises `NotFound` if a desired model does not exist."""
    error: MaasError | None = None
    models = registry.models()
    for spec in [desired] if desired is not None else _referring(name, specs) or [ServedModelSpec(name=name)]:
        try:
            find_version(models, name, spec.ref, registry.uri)
        except NotFound as failure:
            error = for_callers(failure, _named(models, name, spec.ref))
        else:
            return
    if error is not None:
        raise error


def named_before(registry: Registry, spec: ServedModelSpec, version: Version) -> list[Version]:
    """Returns the earlier versions of the alias, newest first, each once; empty for a fixed version."""
    if spec.version is not None:
        return []
    numbers = [
        int(event["version"])
        for _, event in registry.history(spec.name)
        if event["type"] == "alias" and event["alias"] == spec.alias
    ]
    earlier = [number for number in dict.fromkeys(reversed(numbers)) if number != version.version]
    versions = registry.resolve_all((spec.name, number) for number in earlier)
    return [version for version in versions if isinstance(version, Version)]


def _expand(
    models: Mapping[str, Model], specs: Sequence[ServedModelSpec], desired: Mapping[str, DesiredModel]
) -> Iterator[tuple[ServedModelSpec, bool, bool]]:
    """Yields references to single models in order of rank, each with `is_listed` and `is_override`."""
    for desired_model in desired.values():
        if desired_model.is_load and desired_model.spec is not None:
            yield desired_model.spec, False, True
    for spec in specs:
        if not spec.is_pattern:
            yield spec, True, False
    for spec in specs:
        if spec.is_pattern:
            for name, model in sorted(models.items()):
                if spec.alias in model.aliases and fnmatchcase(name, spec.name):
                    yield spec.model_copy(update={"name": name}), False, False
    for name, desired_model in desired.items():
        # Last, so that it is used only if nothing else refers to the model.
        if desired_model.is_load and desired_model.spec is None and not _referring(name, specs):
            yield ServedModelSpec(name=name), False, False


def _referring(name: str, specs: Sequence[ServedModelSpec]) -> list[ServedModelSpec]:
    return [spec for spec in specs if fnmatchcase(name, spec.name)]


def _resolve(models: Mapping[str, Model], uri: str, spec: ServedModelSpec) -> Version | MaasError:
    try:
        return find_version(models, spec.name, spec.ref, uri)
    except NotFound as error:
        return for_callers(error, _named(models, spec.name, spec.ref))


def _named(models: Mapping[str, Model], name: str, ref: int | str) -> str:
    """Returns the most specific part of a reference that the registry contains, for messages."""
    if name not in models:
        return f"model {name!r}"
    return f"version {ref} of model {name!r}" if isinstance(ref, int) else f"alias {ref!r} of model {name!r}"
