"""What a search is: a training spec, the fields that vary, the metric that counts. Knows neither Ray nor torch."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maas_ray.spec import Spec, parse_spec, read_document
from maas_ray.train.spec.metrics import LARGER_IS_BETTER, VALIDATION

MAX_TRIALS = 10_000
DIGITS = 6
"""Significant digits of a drawn number, so that what a table shows is what was trained with."""


class Uniform(Spec):
    """A number in [lower, upper), as `ray.tune.uniform`."""

    kind: Literal["uniform"]
    lower: FiniteFloat
    upper: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.lower, self.upper)
        return self

    def value(self, part: float) -> float:
        """The value at a part in [0, 1) of the range."""
        return _rounded(self.lower + part * (self.upper - self.lower), self.lower, self.upper)


class LogUniform(Spec):
    """A positive number whose logarithm is uniform, as `ray.tune.loguniform`: for learning rates and other factors."""

    kind: Literal["loguniform"]
    lower: float = Field(gt=0.0, allow_inf_nan=False)
    upper: float = Field(gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.lower, self.upper)
        return self

    def value(self, part: float) -> float:
        """The value at a part in [0, 1) of the range."""
        lower, upper = math.log(self.lower), math.log(self.upper)
        return _rounded(math.exp(lower + part * (upper - lower)), self.lower, self.upper)


class RandInt(Spec):
    """A whole number from `lower` to `upper` - 1, as `ray.tune.randint`."""

    kind: Literal["randint"]
    lower: int
    upper: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.lower, self.upper)
        return self

    def value(self, part: float) -> int:
        """The value at a part in [0, 1) of the range."""
        return self.lower + int(part * (self.upper - self.lower))


class Choice(Spec):
    """One of several values, drawn, as `ray.tune.choice`."""

    kind: Literal["choice"]
    categories: list[Any] = Field(min_length=1)

    def value(self, part: float) -> Any:
        """The value at a part in [0, 1) of the list."""
        return self.categories[int(part * len(self.categories))]


class GridSearch(Spec):
    """Every one of several values, combined with all other grids, as `ray.tune.grid_search`."""

    kind: Literal["grid_search"]
    values: list[Any] = Field(min_length=1)


Drawn = Uniform | LogUniform | RandInt | Choice
Axis = Annotated[Drawn | GridSearch, Field(discriminator="kind")]


class SchedulerSpec(Spec):
    """Which trials are stopped early."""

    name: Literal["none", "asha"] = "none"
    """`asha`: asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934). At `grace_period`,
    `grace_period * reduction_factor`, … of its length a trial continues only if its metric is among the best `1 /
    reduction_factor` of those reported so far."""
    grace_period: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of its own length that every trial may train."""
    reduction_factor: float = Field(default=3.0, gt=1.0, allow_inf_nan=False)


class TuneSpec(Spec):
    """A search for the best values of some fields of a training spec. Each trial is a run `<name>-<number>`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,89}$")
    """Of the search; one that exists is refused unless it is resumed."""
    base: dict[str, Any]
    """The fields of a TrainSpec, or in a file the path of one, relative to the search's own; `run` may be left out."""
    search: dict[str, Axis] = Field(min_length=1)
    """What varies, by the field's path: `optimizer.lr: {kind: loguniform, lower: 1.0e-4, upper: 0.1}`. Other kinds, named
    and meant as in Ray Tune: `uniform` and `randint` (`lower`, `upper`), `choice` (`categories`), `grid_search` (`values`)."""
    trials: int = Field(default=1, ge=1, le=MAX_TRIALS)
    """Draws of the fields that are not grids; each combination of the grids has draws of its own."""
    metric: str = "validation_loss"
    """`loss`, or a metric of the validation split, such as `validation_accuracy`; what a trial has at its end counts."""
    mode: Literal["min", "max"] | None = None
    """Whether a smaller or a larger metric is better; None: as it is for this one."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; None: as many as the cluster's resources hold."""
    scheduler: SchedulerSpec = SchedulerSpec()
    seed: NonNegativeInt = 0
    """Decides what is drawn. More trials of the same seed begin with the same ones."""
    time_limit_s: PositiveFloat | None = None
    """After this time trials are stopped where they are; resuming the search goes on with them."""

    @property
    def direction(self) -> Literal["min", "max"]:
        """`mode`, or what it is for the metric."""
        return self.mode or ("max" if self.metric.removeprefix(VALIDATION) in LARGER_IS_BETTER else "min")

    @model_validator(mode="after")
    def _own_fields(self) -> Self:
        for path in self.search:
            if path == "run" or path.split(".")[0] == "storage":
                raise ValueError(f"search: {path!r} cannot vary: every trial is a run of its own in one store")
        drawn = [path for path, axis in self.search.items() if not isinstance(axis, GridSearch)]
        if not drawn and self.trials != 1:
            raise ValueError(f"search: with grids alone the {self.trials} trials would be the same; leave trials out")
        return self


def load_tune_spec(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TuneSpec:
    """Reads a search from a YAML file, and its base too if that is a path.

    Args:
        path: the YAML file.
        overrides: assignments such as `trials=8` or `base.storage.uri=s3://bucket/maas`.

    Raises:
        SpecError: one of the files cannot be read, or something in them is wrong.
    """
    document = read_document(path)
    if isinstance(document, dict) and isinstance(document.get("base"), str):
        document["base"] = read_document(Path(path).parent / document["base"])
    return parse_spec(TuneSpec, document, overrides, source=str(path))


def _rounded(value: float, low: float, high: float) -> float:
    return min(high, max(low, float(f"{value:.{DIGITS}g}")))


def _refuse_unordered(lower: float, upper: float) -> None:
    if lower >= upper:
        raise ValueError(f"lower {lower} has to be below upper {upper}")
