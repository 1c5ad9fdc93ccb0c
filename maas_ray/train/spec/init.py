"""What a new run may start from. Knows no weights: see train/state/warm_start.py."""

from pathlib import Path
from typing import Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.spec import Spec


class InitSpec(Spec):
    """What a run starts from: `hf`, or `run` and perhaps `step`."""

    hf: str | None = None
    """A folder in Llama's format (config.json and *.safetensors), for the family `decoder`: a directory, or a URI as in
    `storage`. Models of transformers (`hf:…`) take theirs by `model.params.path`."""
    run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Another run of this store with the same model; its checkpoint is kept from then on. Taken are the weights that the
    optimizer has left; for the moving average that a run keeps, export it and name the folder under `hf`."""
    step: PositiveInt | None = None
    """Which of that run's checkpoints; None: the newest."""

    def absolute(self) -> Self:
        """The same with the whole path of a directory: workers run in others."""
        if self.hf is None or "://" in self.hf:
            return self
        return self.model_copy(update={"hf": str(Path(self.hf).expanduser().absolute())})

    def as_settled(self, settled: "InitSpec | None") -> Self:
        """What is meant by this when a run is resumed that was started with `settled`: its step, if none is named."""
        is_open = self.run is not None and self.step is None and settled is not None and settled.run == self.run
        return self.model_copy(update={"step": settled.step}) if is_open and settled is not None else self.absolute()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.hf is None) == (self.run is None):
            raise ValueError("give either hf or run")
        if self.step is not None and self.run is None:
            raise ValueError("step is one of a run: give run too")
        return self
