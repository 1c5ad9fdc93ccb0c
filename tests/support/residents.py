"""The models that a replica has in memory, as a request finds them."""

from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.manager import ModelManager


def resident(manager: ModelManager, name: str, version: int | None = None) -> Loaded:
    """The version that answers a request for `name`; it must be in memory. Raises as `ModelManager.find`."""
    found = manager.find(name, version)
    assert found is not None, f"{name} is not in memory"
    return found
