"""Publishing a version of a model, and what an interruption of it leaves. For `publish` and `import`."""

from typing import TYPE_CHECKING

from maas_ray.console.leaving import leaves, published
from maas_ray.process.interrupts import held

if TYPE_CHECKING:
    from maas_ray.registry.models import Version
    from maas_ray.store.objects import ObjectStore


def begin_publishing(name: str) -> None:
    """Refuses a name that no model can have, and says what an interruption leaves before anything is published."""
    from maas_ray.registry.models import check_name

    leaves("nothing was published; run the command again (`maas-ray fsck --gc` removes what was half written)")
    check_name(name, "model")


def publish_version(store: "ObjectStore", name: str, bundle: str, *, token: str | None, alias: str | None) -> "Version":
    """Publishes a bundle as the next version of a model, and points an alias at it if one is asked for."""
    from maas_ray.registry.models import Registry

    registry = Registry(store)
    with held():  # what was published is said
        version = registry.publish(name, bundle, token=token)
        leaves(published(name, version.version, alias))
    if alias:
        with held():
            registry.promote(name, version.version, alias)
            leaves(published(name, version.version, None))
    return version
