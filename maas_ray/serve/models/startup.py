"""Startup: which models a replica loads before it accepts requests, and which failures keep it from starting."""

from collections.abc import Iterable

from maas_ray.display import get_logger
from maas_ray.errors import MaasError, StoreUnavailable
from maas_ray.registry.models import Version
from maas_ray.serve.models.loader import ModelLoader
from maas_ray.serve.models.pending import Load
from maas_ray.serve.models.references import ModelReference

log = get_logger(__name__)


async def choose_first(
    references: Iterable[ModelReference], loader: ModelLoader, budget_bytes: int | None
) -> list[ModelReference]:
    """Returns the references to load at start: all pinned ones, then those in the spec, until one does not fit.

    Args:
        references: references of the pool, in the order of the spec.
        loader: reads the sizes of versions.
        budget_bytes: memory budget; None: no limit.

    Raises:
        MaasError: a model in the spec is not in the registry.
        StoreUnavailable: a size could not be read in time.
    """
    references = list(references)
    for reference in references:
        if reference.is_listed and reference.named is None and reference.error is not None:
            raise reference.error
    known = [(reference, reference.named) for reference in references if reference.named is not None]
    pinned = [(reference, version) for reference, version in known if reference.spec.pinned]
    chosen = [reference for reference, _ in pinned]
    others = [
        (reference, version)
        for reference, version in known
        if not reference.spec.pinned and (reference.is_listed or reference.is_desired)
    ]
    if budget_bytes is None:
        return chosen + [reference for reference, _ in others]
    left = budget_bytes - sum([await _size(loader, version) for _, version in pinned])
    for reference, version in others:
        num_bytes = await _size(loader, version)
        # A model larger than the whole budget is tried anyway, so that the reason is reported now.
        if left < num_bytes <= budget_bytes:
            break
        chosen.append(reference)
        left -= num_bytes
    return chosen


def check_first(chosen: Iterable[ModelReference], loads: Iterable[Load]) -> None:
    """Logs the models in the spec that could not be loaded; raises the first error if there is no other."""
    listed = [(reference, load) for reference, load in zip(chosen, loads, strict=True) if reference.is_listed]
    failed = [(reference, load.error) for reference, load in listed if load.error is not None]
    for reference, error in failed:
        log.error("model %r is not served: %s", reference.spec.name, error)
    if failed and len(failed) == len(listed):
        raise failed[0][1]


async def _size(loader: ModelLoader, version: Version) -> int:
    """Returns the memory of a version; 0 if that cannot be read, which its load then reports."""
    try:
        return await loader.size(version)
    except StoreUnavailable:
        raise
    except MaasError:
        return 0
