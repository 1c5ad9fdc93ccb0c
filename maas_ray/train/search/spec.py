"""The spec of a search: a training spec, the searched fields and the metric. Independent of Ray and torch."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maas_ray.spec import Spec, parse_spec, read_document
from maas_ray.train.spec.metrics import LARGER_IS_BETTER, VALIDATION

MAX_TRIALS = 10_000
DIGITS = 6
"""Significant digits of a drawn number, so that tables show the exact value."""


class Uniform(Spec):
    """A number in [lower, upper), the same as `ray.tune.uniform`."""

    kind: Literal["uniform"]
    lower: FiniteFloat
    upper: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.lower, self.upper)
        return self

    def value(self, part: float) -> float:
        """The value at a position in [0, 1) of the range."""
        return _rounded(self.lower + part * (self.upper - self.lower), self.lower, self.upper)


class LogUniform(Spec):
    """A positive number with a uniform logarithm, the same as `ray.tune.loguniform`, for learning rates and factors."""

    kind: Literal["loguniform"]
    lower: float = Field(gt=0.0, allow_inf_nan=False)
    upper: float = Field(gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.lower, self.upper)
        return self

    def value(self, part: float) -> float:
        """The value at a position in [0, 1) of the range."""
        lower, upper = math.log(self.lower), math.log(self.upper)
        return _rounded(math.exp(lower + part * (upper - lower)), self.lower, self.upper)


class RandInt(Spec):
    """An integer from `lower` to `upper` - 1, the same as `ray.tune.randint`."""

    kind: Literal["randint"]
    lower: int
    upper: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.lower, self.upper)
        return self

    def value(self, part: float) -> int:
        """The value at a position in [0, 1) of the range."""
        return self.lower + int(part * (self.upper - self.lower))


class Choice(Spec):
    """A random one of several values, the same as `ray.tune.choice`."""

    kind: Literal["choice"]
    categories: list[Any] = Field(min_length=1)

    def value(self, part: float) -> Any:
        """The value at a position in [0, 1) of the list."""
        return self.categories[int(part * len(self.categories))]


class GridSearch(Spec):
    """Each of several values, combined with all other grids, the same as `ray.tune.grid_search`."""

    kind: Literal["grid_search"]
    values: list[Any] = Field(min_length=1)


Drawn = Uniform | LogUniform | RandInt | Choice
Axis = Annotated[Drawn | GridSearch, Field(discriminator="kind")]


class SchedulerSpec(Spec):
    """The scheduler, which stops trials early."""

    name: Literal["none", "asha"] = "none"
    """`asha`: asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934). At `grace_period`,
    `grace_period * reduction_factor`, … of its length a trial continues only if its metric is among the best `1 /
    reduction_factor` of the reported ones."""
    grace_period: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of its length that every trial trains at least."""
    reduction_factor: float = Field(default=3.0, gt=1.0, allow_inf_nan=False)


class TuneSpec(Spec):
    """A search for the best values of some fields of a training spec. Each trial is a run `<name>-<number>`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,89}$")
    """Name of the search; an existing search is refused unless it is resumed."""
    base: dict[str, Any]
    """The fields of a TrainSpec, or the path of its file, relative to the file of the search; `run` is optional."""
    search: dict[str, Axis] = Field(min_length=1)
    """The searched fields, by path: `optimizer.lr: {kind: loguniform, lower: 1.0e-4, upper: 0.1}`. Other kinds, as in
    Ray Tune: `uniform` and `randint` (`lower`, `upper`), `choice` (`categories`), `grid_search` (`values`)."""
    trials: int = Field(default=1, ge=1, le=MAX_TRIALS)
    """Number of draws of the fields without a grid, for each combination of the grids."""
    metric: str = "validation_loss"
    """`loss`, or a metric of the validation split, such as `validation_accuracy`; the last value of a trial counts."""
    mode: Literal["min", "max"] | None = None
    """Whether a smaller or a larger metric is better; None: derived from the metric."""
    max_concurrent: PositiveInt | None = None
    """Number of concurrent trials; None: as many as the cluster's resources allow."""
    scheduler: SchedulerSpec = SchedulerSpec()
    seed: NonNegativeInt = 0
    """Seed of the draws. With more trials, the first ones remain the same."""
    time_limit_s: PositiveFloat | None = None
    """Time limit, after which running trials are stopped; a resumed search continues them."""

    @property
    def direction(self) -> Literal["min", "max"]:
        """`mode`, or the direction of the metric."""
        return self.mode or ("max" if self.metric.removeprefix(VALIDATION) in LARGER_IS_BETTER else "min")

    @model_validator(mode="after")
    def _own_fields(self) -> Self:
        for path in self.search:
            if path == "run" or path.split(".")[0] == "storage":
                raise ValueError(f"search: {path!r} cannot be searched: all trials are runs in one store")
        drawn = [path for path, axis in self.search.items() if not isinstance(axis, GridSearch)]
        if not drawn and self.trials != 1:
            raise ValueError(f"search: with grids only, {self.trials} trials would be identical; remove trials")
        return self


def load_tune_spec(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TuneSpec:
    """Reads a search from a YAML file, including the file of its base.

    Args:
        path: the YAML file.
        overrides: assignments such as `trials=8` or `base.storage.uri=s3://bucket/maas`.

    Raises:
        SpecError: a file cannot be read or is invalid.
    """
    document = read_document(path)
    if isinstance(document, dict) and isinstance(document.get("base"), str):
        document["base"] = read_document(Path(path).parent / document["base"])
    return parse_spec(TuneSpec, document, overrides, source=str(path))


def _rounded(value: float, low: float, high: float) -> float:
    return min(high, max(low, float(f"{value:.{DIGITS}g}")))


def _refuse_unordered(lower: float, upper: float) -> None:
    if lower >= upper:
        raise ValueError(f"lower {lower} must be below upper {upper}")
