"""The length of a run, and its extensions. Without torch."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from maas_ray.errors import SpecError
from maas_ray.spec import Spec

Unit = Literal["epochs", "steps"]
DEFAULT_EPOCHS = 10


class ExtensionSpec(Spec):
    """One extension of a run; written by `--extend`, not by hand."""

    step: NonNegativeInt
    """Optimizer steps that were completed at the extension."""
    position: NonNegativeInt
    """Samples that these steps had used; the next step begins with the sample after them."""
    epochs: PositiveInt | None = Field(default=None, exclude_if=lambda value: value is None)
    """The new number of epochs."""
    steps: PositiveInt | None = Field(default=None, exclude_if=lambda value: value is None)
    """The new number of steps."""


def position_of(step: int, global_size: int, extensions: Sequence[ExtensionSpec]) -> int:
    """Global sample position at which a step begins, from 0.

    Args:
        step: number of the step, from 0.
        global_size: samples of a step.
        extensions: the extensions of the run, oldest first. The last step before one may have been smaller.
    """
    begun = max((each for each in extensions if each.step <= step), key=lambda each: each.step, default=None)
    first, position = (begun.step, begun.position) if begun is not None else (0, 0)
    return position + (step - first) * global_size


def parse_length(given: Mapping[str, object], unit: Unit) -> int:
    """The new length of a run.

    Args:
        given: one number by its unit.
        unit: the unit of the run's length.

    Raises:
        SpecError: another unit, or no positive integer.
    """
    if set(given) != {unit}:
        raise SpecError(
            f"extend: the length of this run is given in {unit}; use {unit}=N, not {', '.join(given) or 'nothing'}"
        )
    number = given[unit]
    if type(number) is not int or number < 1:
        raise SpecError(f"extend: {unit} must be a positive integer, got {number!r}")
    return number
