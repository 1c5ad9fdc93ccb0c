"""What a pool's model references name, and the memory of what did not load. Reads the registry; loads nothing."""

from dataclasses import dataclass

from maas_ray.errors import MaasError
from maas_ray.registry.models import Registry, Version
from maas_ray.serve.spec import ModelSpec, RefreshSpec


@dataclass
class Slot:
    """One model reference of the pool: what it serves now, and why it does not serve something newer."""

    spec: ModelSpec
    serving: int | None = None
    """The version that answers; None until the first one is loaded."""
    problem: str | None = None
    """Why it does not serve what the registry names; None if it does."""
    _failed: int | None = None
    _retry_at: float = 0.0
    _pause_s: float = 0.0

    def is_due(self, version: int, now: float) -> bool:
        """Whether a version should be loaded now: it is not served, and did not just fail."""
        return version != self.serving and (version != self._failed or now >= self._retry_at)

    def note_failure(self, version: int, error: MaasError, now: float, refresh: RefreshSpec) -> None:
        """Remembers that a version does not load; it is tried again after a pause that doubles."""
        self._pause_s = min(max(2 * self._pause_s, refresh.every_s), refresh.max_backoff_s)
        self._failed, self._retry_at = version, now + self._pause_s
        self.problem = f"version {version} does not load: {error}"

    def note_success(self) -> None:
        """Forgets earlier failures."""
        self.problem, self._failed, self._pause_s = None, None, 0.0


def resolve_all(registry: Registry, specs: list[ModelSpec]) -> list[Version | MaasError]:
    """What each reference names now, or why it names nothing; one look at the registry for all of them."""
    models = registry.models()
    resolved: list[Version | MaasError] = []
    for spec in specs:
        model = models.get(spec.name)
        number = spec.version or (model.aliases.get(spec.alias) if model else None)
        known = model.versions.get(number) if model and number else None
        try:
            resolved.append(known or registry.resolve(spec.name, spec.ref))
        except MaasError as error:
            resolved.append(error)
    return resolved


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
