"""Draws the trials of a search, each a validated TrainSpec. The same spec always draws the same trials."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

from maas_ray.errors import SpecError
from maas_ray.spec import assign, canonical_json, parse_spec
from maas_ray.train.search.spec import MAX_TRIALS, GridSearch, TuneSpec
from maas_ray.train.spec.metrics import refuse_metric
from maas_ray.train.spec.train import TrainSpec

_REDRAWS = 100


@dataclass(frozen=True)
class Trial:
    """One combination of values of the searched fields."""

    number: int
    fields: Mapping[str, Any]
    """The value of each searched field, by its path."""
    document: Mapping[str, Any]
    """The training spec as a document: the base with these values."""
    spec: TrainSpec

    @property
    def run(self) -> str:
        """Id of the trial's run."""
        return self.spec.run


def draw_trials(spec: TuneSpec) -> list[Trial]:
    """All trials of a search, in order: for each draw, every combination of the grids.

    A value depends only on the seed, the trial's number and the field's path, so that further fields or trials do not
    change existing values.

    Raises:
        SpecError: an unknown field, an invalid value, or a space with too few different trials.
    """
    grids = {path: axis.values for path, axis in spec.search.items() if isinstance(axis, GridSearch)}
    combinations = [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]
    if (number := spec.trials * len(combinations)) > MAX_TRIALS:
        raise SpecError(f"the search has {number} trials, the limit is {MAX_TRIALS}; use choice instead of grid_search")
    trials: list[Trial] = []
    seen: set[bytes] = set()
    for number in range(spec.trials * len(combinations)):
        fields = _fresh(spec, combinations[number % len(combinations)], number, seen)
        trials.append(_trial(spec, number, fields))
    return trials


def _fresh(spec: TuneSpec, grid: Mapping[str, Any], number: int, seen: set[bytes]) -> dict[str, Any]:
    """Draws values that differ from those of all earlier trials; short lists need several draws."""
    for attempt in range(_REDRAWS):
        fields = {}
        for path, axis in spec.search.items():
            if isinstance(axis, GridSearch):
                fields[path] = grid[path]
            else:
                # `random()` is the only method whose sequence for a seed Python guarantees not to change.
                fields[path] = axis.value(Random(f"{spec.seed}/{number}/{path}/{attempt}").random())  # noqa: S311
        key = canonical_json(fields)
        if key not in seen:
            seen.add(key)
            return fields
    raise SpecError(
        f"the space has only about {len(seen)} different trials, and trial {number} would repeat one; lower trials, or "
        "use grid_search instead of choice"
    )


def _trial(spec: TuneSpec, number: int, fields: dict[str, Any]) -> Trial:
    document = copy.deepcopy(spec.base)
    chosen = ", ".join(f"{path}={value}" for path, value in fields.items())
    for path, value in fields.items():
        assign(document, path, value)
    document["run"] = run_id(spec.name, number)
    trained = parse_spec(TrainSpec, document, source=f"trial {number} ({chosen})")
    split = trained.data.split
    has_validation = split.column is not None or split.validation > 0
    own = [metric.label for metric in trained.metrics]
    refuse_metric("tune", spec.metric, spec.direction, trained.data.task, has_validation, own)
    return Trial(number, fields, document, trained)


def run_id(search: str, number: int) -> str:
    """The id of a trial's run."""
    return f"{search}-{number}"
