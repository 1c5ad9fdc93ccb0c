"""The spec of a run's initial weights, which train/state/warm_start.py loads."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.spec import Spec


class InitSpec(Spec):
    """Initial weights of a run: `hf`, `safetensors`, or `run` with an optional `step`."""

    hf: str | None = None
    """Folder in Llama's format (config.json and *.safetensors), for the family `decoder`: a directory, or a URI as in
    `storage`. Models of Transformers (`hf:…`) use `model.params.path` instead."""
    safetensors: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Folder of *.safetensors with any model's weights, whose names are the model's after `rename`: a directory, or a URI
    as in `storage`. Only names and shapes are compared, so the model must compute the same with these weights."""
    run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Another run of this store with the same model, whose checkpoint is then kept. Uses the weights, not their moving
    average; to use the average, export it and set `hf` to the folder."""
    step: PositiveInt | None = None
    """Step of that run's checkpoint; None: the newest."""
    rename: dict[str, str] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """safetensors: beginnings of names in the folder, each with the beginning in the model that replaces it; the longest
    matching one is used."""
    include: tuple[str, ...] = Field(default=("*",), exclude_if=lambda value: value == ("*",))
    """Patterns (`encoder.*`) of the names of weights in the model that are loaded."""
    exclude: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Patterns of the names of weights that are not loaded although `include` matches them, such as `head.*`."""
    missing: Literal["refuse", "random"] = Field(default="refuse", exclude_if=lambda value: value == "refuse")
    """Weights of the model that are not loaded: refuse the run, or keep their random values from `seed`."""
    unused: Literal["refuse", "ignore"] = Field(default="refuse", exclude_if=lambda value: value == "refuse")
    """Weights of the source that match the patterns and that the model does not have: refuse the run, or ignore them."""

    def absolute(self) -> Self:
        """Returns the spec with the absolute path of a directory, since workers run in other directories."""
        changes = {
            name: str(Path(folder).expanduser().absolute())
            for name, folder in (("hf", self.hf), ("safetensors", self.safetensors))
            if folder is not None and "://" not in folder
        }
        return self.model_copy(update=changes) if changes else self

    def as_settled(self, settled: "InitSpec | None") -> Self:
        """Returns the spec for resuming a run that was started with `settled`, whose step replaces a missing one."""
        is_open = self.run is not None and self.step is None and settled is not None and settled.run == self.run
        return self.model_copy(update={"step": settled.step}) if is_open and settled is not None else self.absolute()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(source is not None for source in (self.hf, self.safetensors, self.run)) != 1:
            raise ValueError("give exactly one of hf, safetensors and run")
        if self.step is not None and self.run is None:
            raise ValueError("step needs run")
        if self.rename and self.safetensors is None:
            raise ValueError("rename needs safetensors: weights of hf and run have known names")
        return self
