"""The models that a replica has in memory, as a request finds them."""

from typing import Any

from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.manager import ModelManager


def resident(manager: ModelManager, name: str, version: int | None = None) -> Loaded:
    """The version that answers a request for `name`; it must be in memory. Raises as `ModelManager.find`."""
    found = manager.find(name, version)
    assert found is not None, f"{name} is not in memory"
    return found


class HeldRuns:
    """Runs of a model that the batcher has started and that do not begin before `release`."""

    def __init__(self, model: Loaded) -> None:
        self._runner, self._start = model.runner, model.runner.start
        self.runs: list[Any] = []
        self._runner.start = lambda *run: self.runs.append(run)  # type: ignore[method-assign]

    def release(self) -> None:
        """Begins the held runs; later ones begin at once."""
        self._runner.start = self._start  # type: ignore[method-assign]
        while self.runs:
            self._start(*self.runs.pop(0))
