"""Versions of models from Python: promotion and import."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maas_ray.api.stores import opened
from maas_ray.store.objects import ObjectStore

if TYPE_CHECKING:
    from maas_ray.registry.models import Model, Version


def list_models(*, store: ObjectStore | str | None = None) -> "dict[str, Model]":
    """The models of a store by name, with their versions and aliases."""
    from maas_ray.registry.models import Registry

    return Registry(opened(store)).models()


def promote(
    model: str, version: "Version | int", alias: str = "production", *, store: ObjectStore | str | None = None
) -> "Version":
    """Points an alias at a version; running pools follow it without a failed request.

    Raises:
        NotFound: no such model or version.
    """
    from maas_ray.registry.models import Registry

    number = version if isinstance(version, int) else version.version
    return Registry(opened(store)).promote(model, number, alias)


def import_onnx(
    file: str | Path,
    model: str,
    *,
    task: Literal["classification", "binary", "regression", "other"] = "other",
    labels: Sequence[str] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    sample: str | Path | None = None,
    is_checked: bool = True,
    batch_axis: str | None = None,
    alias: str | None = None,
    token: str | None = None,
    store: ObjectStore | str | None = None,
) -> "Version":
    """Publishes an ONNX file as the next version of a model: inspected, loaded and run in child processes with limits.

    Args:
        file: the graph; external data beside it is put inside.
        model: its name.
        task: what the outputs mean.
        labels: class names in the order of the logits.
        shapes: sizes of inputs by name, where the file leaves them open.
        sample: a file of values for the first runs.
        is_checked: whether the graph is run on random values.
        batch_axis: name of the batch dimension, or `none`.
        alias: also promotes the version, such as `production`.
        token: names this publish; a repeat with the same token finds its version.
        store: an open store, its URI, or None for the default one.

    Raises:
        BundleError: the graph is not servable; the message names the node and the reason.
    """
    from maas_ray.registry.importing import import_onnx as import_file
    from maas_ray.registry.models import Registry, check_name

    check_name(model, "model")
    found = opened(store)
    imported = import_file(
        found,
        file,
        task=task,
        labels=None if labels is None else tuple(labels),
        shapes=None if shapes is None else {name: tuple(sizes) for name, sizes in shapes.items()},
        sample=None if sample is None else Path(sample),
        is_checked=is_checked,
        batch_axis=batch_axis,
    )
    registry = Registry(found)
    version = registry.publish(model, imported.bundle_id, token=token)
    return registry.promote(model, version.version, alias) if alias else version
