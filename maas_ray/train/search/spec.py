"""What a search is: a training spec, the fields that vary, the figure that counts. Knows neither Ray nor torch."""

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
    """A number anywhere between two."""

    kind: Literal["uniform"]
    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.low, self.high)
        return self

    def value(self, part: float) -> float:
        """The value at a part in [0, 1) of the range."""
        return _rounded(self.low + part * (self.high - self.low), self.low, self.high)


class LogUniform(Spec):
    """A positive number whose logarithm lies anywhere between those of two: for learning rates and other factors."""

    kind: Literal["log_uniform"]
    low: float = Field(gt=0.0, allow_inf_nan=False)
    high: float = Field(gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.low, self.high)
        return self

    def value(self, part: float) -> float:
        """The value at a part in [0, 1) of the range."""
        low, high = math.log(self.low), math.log(self.high)
        return _rounded(math.exp(low + part * (high - low)), self.low, self.high)


class Int(Spec):
    """A whole number between two, both included."""

    kind: Literal["int"]
    low: int
    high: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _refuse_unordered(self.low, self.high)
        return self

    def value(self, part: float) -> int:
        """The value at a part in [0, 1) of the range."""
        return self.low + int(part * (self.high - self.low + 1))


class Choice(Spec):
    """One of some values, drawn."""

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=1)

    def value(self, part: float) -> Any:
        """The value at a part in [0, 1) of the list."""
        return self.values[int(part * len(self.values))]


class Grid(Spec):
    """Every one of some values, with every combination of the other grids."""

    kind: Literal["grid"]
    values: list[Any] = Field(min_length=1)


Drawn = Uniform | LogUniform | Int | Choice
Axis = Annotated[Drawn | Grid, Field(discriminator="kind")]


class SchedulerSpec(Spec):
    """Which trials are stopped before their end."""

    name: Literal["none", "asha"] = "none"
    """`asha`: asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934). At `grace`, `grace *
    reduction`, … of its length a trial goes on only if its figure is among the best `1 / reduction` of those that have
    come so far."""
    grace: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Part of its own length that every trial may train."""
    reduction: float = Field(default=3.0, gt=1.0, allow_inf_nan=False)


class TuneSpec(Spec):
    """A search for the best values of some fields of a training spec. Each trial is a run `<name>-<number>`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,89}$")
    """Of the search; one that exists is refused unless it is resumed."""
    base: dict[str, Any]
    """The fields of a TrainSpec, or in a file the path of one, relative to the search's own; `run` may be left out."""
    search: dict[str, Axis] = Field(min_length=1)
    """What varies, by the field's path: `optimizer.lr: {kind: log_uniform, low: 1.0e-4, high: 0.1}`. Other kinds:
    `uniform` and `int` (`low`, `high`), `choice` and `grid` (`values`)."""
    trials: int = Field(default=1, ge=1, le=MAX_TRIALS)
    """Draws of the fields that are not grids; each combination of the grids has draws of its own."""
    metric: str = "validation_loss"
    """`loss`, or a figure of the validation split, such as `validation_accuracy`; what a trial has at its end counts."""
    mode: Literal["min", "max"] | None = None
    """Whether a smaller or a larger figure is better; None: as it is for this one."""
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
        drawn = [path for path, axis in self.search.items() if not isinstance(axis, Grid)]
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


def _refuse_unordered(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"low {low} has to be below high {high}")
