"""Which checkpoint of a run somebody means: the newest, the best, or one by its step."""

from typing import Literal

from maas_ray.checkpoint.catalog import list_checkpoints, open_step
from maas_ray.errors import NotFound, SpecError
from maas_ray.store.fetch import in_parallel
from maas_ray.store.objects import ObjectStore
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix
from maas_ray.train.spec.metrics import best_step

Which = int | Literal["newest", "best"] | None
"""A step, or one of two words; None: as the run's spec says under `checkpoint.use`."""


def parse_which(text: str | None) -> Which:
    """What a user has written. Raises `SpecError` if it is neither a step nor one of the words."""
    if text is None or text == "newest" or text == "best":
        return text  # type: ignore[return-value]
    if text.isdecimal():
        return int(text)
    raise SpecError(f"no checkpoint {text!r}: give newest, best, or the number of a step")


def choose_step(store: ObjectStore, run: RunRecord, which: Which) -> int:
    """The step of a committed checkpoint.

    Raises:
        NotFound: the run has no checkpoint, or none with the metric that `best` goes by.
        ObjectCorrupt: a manifest is altered.
    """
    steps = list_checkpoints(store, checkpoints_prefix(run.id))
    by = run.spec.checkpoint
    which = by.use if which is None else which
    if isinstance(which, int):
        return which
    if not steps:
        raise NotFound(f"run {run.id!r} has no committed checkpoint yet")
    if which == "newest":
        return steps[-1]
    best = best_step(metrics_by_step(store, run.id, steps), by.metric, by.mode)
    if best is None:
        raise NotFound(
            f"no checkpoint of run {run.id!r} has the metric {by.metric} (checkpoint.metric), so none is the best; give "
            f"newest or one of the steps {', '.join(map(str, steps))}"
        )
    return best


def metrics_by_step(store: ObjectStore, run: str, steps: list[int]) -> dict[int, dict[str, float]]:
    """The metrics of each checkpoint: those that it was committed with, and those that were found later."""
    found = Runs(store).validated(run)
    prefix = checkpoints_prefix(run)
    opened = in_parallel(lambda step: open_step(store, prefix, step), steps)
    return {
        step: {**committed.meta["state"].get("metrics", {}), **found.get(step, {})}
        for step, committed in zip(steps, opened, strict=True)
    }
