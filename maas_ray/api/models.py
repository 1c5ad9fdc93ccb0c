"""Models and their versions from Python: list, promote, import."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maas_ray.api.stores import opened
from maas_ray.store.objects import ObjectStore

if TYPE_CHECKING:
    from maas_ray.registry.models import Model, Version


def list_models(*, store: ObjectStore | str | None = None) -> "dict[str, Model]":
    """Lists the models of a store by name, with their versions and aliases."""
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
    """Publishes an ONNX file as the next version of a model, after inspection and test runs in limited child processes.

    Args:
        file: the ONNX file; external data is embedded.
        model: name of the model.
        task: meaning of the outputs.
        labels: class names in the order of the logits.
        shapes: sizes of inputs by name, for sizes that the file leaves open.
        sample: file of input values for the test run and the warm-up.
        is_checked: whether the graph is run on random values.
        batch_axis: name of the batch dimension, or `none`.
        alias: alias to point at the version, such as `production`.
        token: idempotency token; a repeated publish with the same token returns the version of the first one.
        store: an open store, its URI, or None for the default one.

    Raises:
        BundleError: the graph is not servable; the message contains the node and the reason.
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
