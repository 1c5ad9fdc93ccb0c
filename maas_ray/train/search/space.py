"""From a search's space to its trials, each a whole validated TrainSpec. The same spec draws the same ones, anywhere."""

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
    """One choice of the fields that vary."""

    number: int
    fields: Mapping[str, Any]
    """The chosen value of each field, by its path."""
    document: Mapping[str, Any]
    """The training spec as written: the base with these values."""
    spec: TrainSpec

    @property
    def run(self) -> str:
        """The id of its run."""
        return self.spec.run


def draw_trials(spec: TuneSpec) -> list[Trial]:
    """All trials of a search, in order: for each draw every combination of the grids.

    A value depends on nothing but the seed, the trial's number and the field's path. So another field beside it, or more
    trials, change none that were there.

    Raises:
        SpecError: a field that does not exist, a value that does not fit, or a space with too few different trials.
    """
    grids = {path: axis.values for path, axis in spec.search.items() if isinstance(axis, GridSearch)}
    combinations = [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]
    if (number := spec.trials * len(combinations)) > MAX_TRIALS:
        raise SpecError(f"the search has {number} trials; the limit is {MAX_TRIALS}: use choice instead of grid_search")
    trials: list[Trial] = []
    seen: set[bytes] = set()
    for number in range(spec.trials * len(combinations)):
        fields = _fresh(spec, combinations[number % len(combinations)], number, seen)
        trials.append(_trial(spec, number, fields))
    return trials


def _fresh(spec: TuneSpec, grid: Mapping[str, Any], number: int, seen: set[bytes]) -> dict[str, Any]:
    """Values that no trial before has: drawn again while they are the same, which happens with short lists."""
    for attempt in range(_REDRAWS):
        fields = {}
        for path, axis in spec.search.items():
            if isinstance(axis, GridSearch):
                fields[path] = grid[path]
            else:
                # `random()` is the one method whose sequence Python promises to keep for a given seed.
                fields[path] = axis.value(Random(f"{spec.seed}/{number}/{path}/{attempt}").random())  # noqa: S311
        key = canonical_json(fields)
        if key not in seen:
            seen.add(key)
            return fields
    raise SpecError(
        f"the space has only {len(seen)} different trials, or few more, and trial {number} would repeat one; give fewer "
        "trials, or make the lists grids"
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
    refuse_metric("tune", spec.metric, spec.direction, trained.data.task, has_validation)
    return Trial(number, fields, document, trained)


def run_id(search: str, number: int) -> str:
    """The run of a trial."""
    return f"{search}-{number}"
