"""Publishes a version of a model for `publish` and `import`, and reports the state after an interruption."""

from typing import TYPE_CHECKING

from maas_ray.console.leaving import leaves, published
from maas_ray.process.interrupts import held

if TYPE_CHECKING:
    from maas_ray.registry.models import Version
    from maas_ray.store.objects import ObjectStore


def begin_publishing(name: str) -> None:
    """Checks the model name and sets the line that an interruption prints before anything is published."""
    from maas_ray.registry.models import check_name

    leaves("nothing was published; run the command again (`maas-ray fsck --gc` removes partly written objects)")
    check_name(name, "model")


def publish_version(store: "ObjectStore", name: str, bundle: str, *, token: str | None, alias: str | None) -> "Version":
    """Publishes a bundle as the next version of a model; `alias`, if given, is pointed at it."""
    from maas_ray.registry.models import Registry

    registry = Registry(store)
    with held():  # a published version is always reported
        version = registry.publish(name, bundle, token=token)
        leaves(published(name, version.version, alias))
    if alias:
        with held():
            registry.promote(name, version.version, alias)
            leaves(published(name, version.version, None))
    return version
