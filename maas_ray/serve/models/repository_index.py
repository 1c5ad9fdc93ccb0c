"""Index of the v2 model repository extension (Triton, docs/protocol/extension_model_repository.md)."""

from collections.abc import Iterable

from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.references import ModelReference


def index(
    references: Iterable[ModelReference],
    loaded: Iterable[Loaded],
    draining: Iterable[Loaded],
    unloaded: Iterable[str],
    ready_only: bool,
) -> list[dict[str, str]]:
    """Returns the models of a replica, sorted: name, version, state (READY, UNAVAILABLE, LOADING, UNLOADING), reason.

    A model that is not in memory is READY, since requests for it are answered; its reason says that it is not loaded.

    Args:
        references: references of the pool.
        loaded: models in memory that accept requests.
        draining: models that answer their last requests.
        unloaded: models that a client has unloaded.
        ready_only: omits every other state.
    """
    rows: dict[tuple[str, int], tuple[str, str]] = {}
    for old in draining:
        rows[old.version.model, old.version.version] = ("UNLOADING", "answering its last requests")
    for reference in references:
        name = reference.spec.name
        if reference.named is None:
            rows[name, 0] = ("UNAVAILABLE", reference.problem or "not in the registry")
        elif reference.load is not None and reference.load.version is not None:
            rows[name, reference.load.version] = ("LOADING", f"{reference.load.num_waiting} requests wait for it")
        elif reference.error is not None:
            rows[name, reference.named.version] = ("UNAVAILABLE", str(reference.error))
        elif reference.serving is None:
            rows[name, reference.named.version] = ("READY", "not in memory: its next request loads it")
    for each in loaded:
        rows[each.version.model, each.version.version] = ("READY", "")
    for name in unloaded:
        rows.setdefault((name, 0), ("UNAVAILABLE", "unloaded by a client"))
    return [
        {"name": name, "version": str(version) if version else "", "state": state, "reason": reason}
        for (name, version), (state, reason) in sorted(rows.items())
        if state == "READY" or not ready_only
    ]
