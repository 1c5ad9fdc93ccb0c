"""The spec of a run's initial weights, which train/state/warm_start.py loads."""

from pathlib import Path
from typing import Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.spec import Spec


class InitSpec(Spec):
    """Initial weights of a run: `hf`, or `run` with an optional `step`."""

    hf: str | None = None
    """Folder in Llama's format (config.json and *.safetensors), for the family `decoder`: a directory, or a URI as in
    `storage`. Models of Transformers (`hf:…`) use `model.params.path` instead."""
    run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Another run of this store with the same model, whose checkpoint is then kept. Uses the weights, not their moving
    average; to use the average, export it and set `hf` to the folder."""
    step: PositiveInt | None = None
    """Step of that run's checkpoint; None: the newest."""

    def absolute(self) -> Self:
        """Returns the spec with the absolute path of a directory, since workers run in other directories."""
        if self.hf is None or "://" in self.hf:
            return self
        return self.model_copy(update={"hf": str(Path(self.hf).expanduser().absolute())})

    def as_settled(self, settled: "InitSpec | None") -> Self:
        """Returns the spec for resuming a run that was started with `settled`, whose step replaces a missing one."""
        is_open = self.run is not None and self.step is None and settled is not None and settled.run == self.run
        return self.model_copy(update={"step": settled.step}) if is_open and settled is not None else self.absolute()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.hf is None) == (self.run is None):
            raise ValueError("give exactly one of hf and run")
        if self.step is not None and self.run is None:
            raise ValueError("step needs run")
        return self
