"""What a pool's model references name, and the memory of what did not load. Reads the registry; loads nothing.

A reference comes from the spec (one model, or a pattern that stands for many) or from a caller's wish to load a model;
a wish to unload one takes its references away.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from maas_ray.errors import MaasError
from maas_ray.registry.models import Model, Registry, Version
from maas_ray.serve.spec import ModelSpec, RefreshSpec
from maas_ray.serve.waiting import Load
from maas_ray.serve.wanted import Wish


class Reference(NamedTuple):
    """One reference as the registry has it now; no pattern any more."""

    spec: ModelSpec
    is_listed: bool
    """Whether the spec names this model itself, rather than by a pattern, or a caller by a wish."""
    wish: int
    """Number of the caller's wish to load it; 0 if there is none."""
    names: Version | MaasError
    """What it names, or why it names nothing."""


@dataclass(eq=False)
class Slot:
    """One model reference of the pool: what it names, what it serves, and why that is not the same."""

    spec: ModelSpec
    is_listed: bool = True
    wish: int = 0
    is_wished: bool = False
    """A caller has asked for it, and it was not tried since."""
    named: Version | None = None
    """What the registry names; None while it names nothing."""
    serving: int | None = None
    """The version in memory; None while there is none."""
    problem: str | None = None
    """Why it does not serve what the registry names; None if it does, or would with its next request."""
    error: MaasError | None = None
    """What `problem` was made of."""
    load: Load | None = None
    """The load in progress."""
    _failed: int | None = None
    _retry_at: float = 0.0
    _pause_s: float = 0.0

    def note_reference(self, reference: Reference) -> None:
        """Takes over what the registry and the callers say now."""
        if reference.wish > self.wish:
            self.wish, self.is_wished, self._retry_at = reference.wish, True, 0.0
        if isinstance(reference.names, MaasError):
            self.error, self.problem = reference.names, str(reference.names)
            return
        self.named = reference.names
        if self.serving == self.named.version or self._failed != self.named.version:
            self.note_success()

    def is_due(self, version: int, now: float) -> bool:
        """Whether a version should be loaded now: it is not served, and did not just fail."""
        return version != self.serving and (version != self._failed or now >= self._retry_at)

    def note_failure(self, version: int, error: MaasError, now: float, refresh: RefreshSpec) -> None:
        """Remembers that a version does not load; it is tried again after a pause that doubles."""
        self._pause_s = min(max(2 * self._pause_s, refresh.every_s), refresh.max_backoff_s)
        self._failed, self._retry_at = version, now + self._pause_s
        self.error, self.problem = error, f"version {version} does not load: {error}"

    def note_success(self) -> None:
        """Forgets earlier failures."""
        self.error, self.problem, self._failed, self._pause_s = None, None, None, 0.0

    def try_again(self) -> None:
        """Ends the pause after a failure."""
        self._retry_at = 0.0


def resolve_all(
    registry: Registry, specs: Sequence[ModelSpec], wishes: Mapping[str, Wish] | None = None
) -> list[Reference]:
    """All references of a pool as of now, each once; one look at the registry for all of them.

    The first one of a name is what a URL without a version means: a version or alias that a caller wished for, else
    what the spec lists first, else what a pattern matches.
    """
    models = registry.models()
    wishes = wishes or {}
    found: dict[tuple[str, int | str], Reference] = {}
    for spec, is_listed in _expand(models, specs, wishes):
        wish = wishes.get(spec.name)
        if wish is not None and not wish.is_load:
            continue
        if (spec.name, spec.ref) not in found:
            names = _resolve(registry, models, spec)
            number = wish.number if wish is not None else 0
            found[spec.name, spec.ref] = Reference(spec, is_listed, number, names)
    return list(found.values())


def named_before(registry: Registry, spec: ModelSpec, version: Version) -> list[Version]:
    """What the alias named before `version`, newest first, each once; nothing for a fixed version."""
    if spec.version is not None:
        return []
    numbers = [
        int(event["version"])
        for _, event in registry.history(spec.name)
        if event["type"] == "alias" and event["alias"] == spec.alias
    ]
    earlier = [number for number in dict.fromkeys(reversed(numbers)) if number != version.version]
    return [registry.resolve(spec.name, number) for number in earlier]


def _expand(
    models: Mapping[str, Model], specs: Sequence[ModelSpec], wishes: Mapping[str, Wish]
) -> Iterator[tuple[ModelSpec, bool]]:
    """References to single models in the order of their rank, and whether the spec names the model itself."""
    for name, wish in wishes.items():
        if wish.is_load and wish.spec is not None:
            yield wish.spec.model_copy(update={"name": name}), False
    for spec in specs:
        if not spec.is_pattern:
            yield spec, True
    for spec in specs:
        if spec.is_pattern:
            for name, model in sorted(models.items()):
                if spec.alias in model.aliases and fnmatchcase(name, spec.name):
                    yield spec.model_copy(update={"name": name}), False
    for name, wish in wishes.items():
        # Last, so that it counts only where nothing else refers to the model.
        if wish.is_load and wish.spec is None and not any(fnmatchcase(name, spec.name) for spec in specs):
            yield ModelSpec(name=name), False


def _resolve(registry: Registry, models: Mapping[str, Model], spec: ModelSpec) -> Version | MaasError:
    model = models.get(spec.name)
    number = spec.version or (model.aliases.get(spec.alias) if model else None)
    known = model.versions.get(number) if model and number else None
    try:
        return known or registry.resolve(spec.name, spec.ref)
    except MaasError as error:
        return error
