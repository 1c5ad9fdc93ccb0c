"""Selects a checkpoint of a run: the newest, the best, or one by its step."""

from typing import Literal

from maas_ray.checkpoint.catalog import list_checkpoints, open_step
from maas_ray.errors import NotFound, SpecError
from maas_ray.store.fetch import in_parallel
from maas_ray.store.objects import ObjectStore
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix
from maas_ray.train.spec.metrics import best_step

Which = int | Literal["newest", "best"] | None
"""A step, `newest` or `best`; None: `checkpoint.use` of the run's spec."""


def parse_which(text: str | None) -> Which:
    """Parses a selector. Raises `SpecError` if it is neither a step nor `newest` or `best`."""
    if text is None or text == "newest" or text == "best":
        return text  # type: ignore[return-value]
    if text.isdecimal():
        return int(text)
    raise SpecError(f"{text!r} selects no checkpoint; give newest, best, or a step")


def choose_step(store: ObjectStore, run: RunRecord, which: Which) -> int:
    """The step of a committed checkpoint.

    Raises:
        NotFound: the run has no checkpoint, or none with the metric that `best` compares.
        ObjectCorrupt: a manifest is damaged.
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
            f"no checkpoint of run {run.id!r} has the metric {by.metric} (checkpoint.metric) that selects the best; "
            f"give newest or one of the steps {', '.join(map(str, steps))}"
        )
    return best


def metrics_by_step(store: ObjectStore, run: str, steps: list[int]) -> dict[int, dict[str, float]]:
    """The metrics of each checkpoint: those committed with it, and those of later validations."""
    found = Runs(store).validated(run)
    prefix = checkpoints_prefix(run)
    opened = in_parallel(lambda step: open_step(store, prefix, step), steps)
    return {
        step: {**committed.meta["state"].get("metrics", {}), **found.get(step, {})}
        for step, committed in zip(steps, opened, strict=True)
    }
