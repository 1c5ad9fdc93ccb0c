"""Extends a run beyond its length. The extension is recorded before any further step."""

from collections.abc import Mapping, Sequence

from maas_ray.checkpoint.catalog import newest_checkpoint, open_checkpoint, read_saved
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.display import get_logger
from maas_ray.errors import SpecError
from maas_ray.store.objects import ObjectStore
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix
from maas_ray.train.spec.length import DEFAULT_EPOCHS, ExtensionSpec, parse_length
from maas_ray.train.spec.train import TrainSpec

log = get_logger(__name__)


def extend_run(store: ObjectStore, run: RunRecord, spec: TrainSpec, extend: Mapping[str, int]) -> None:
    """Records a larger length of a run; the same length again changes nothing.

    The next sample is the one after those that the newest checkpoint has used, also if the last step was smaller than
    the others because the run ended.

    Args:
        store: the store of the run.
        run: the run.
        spec: the spec with which it continues.
        extend: `{"epochs": N}` or `{"steps": N}`, in the unit of the run.

    Raises:
        SpecError: the length is not larger, the model is not trained in steps, or early stopping would end the run.
    """
    if run.spec.model.is_classical:
        raise SpecError(f"extend: {run.spec.model.name} is fitted by scikit-learn in one step; choose another run name")
    unit = run.spec.unit
    length = parse_length(extend, unit)
    now = run.spec.steps if run.spec.steps is not None else run.spec.epochs or DEFAULT_EPOCHS
    if length == now and run.spec.extensions:
        return
    if length <= now:
        raise SpecError(f"extend: run {run.id!r} has {now} {unit}; give a larger number, not {length}")
    step, position = 0, 0
    prefix = checkpoints_prefix(run.id)
    if newest_checkpoint(store, prefix) is not None:
        saved = read_saved(open_checkpoint(store, prefix))
        step, position = saved.step, saved.cursor
        stopper = spec.stopper()
        if stopper is not None and (reason := stopper.follow(saved.history)) is not None:
            raise SpecError(
                f"extend: run {run.id!r} would end at once ({reason}); remove early_stopping from the spec, or change it"
            )
    num_rows = open_dataset(store, run.data_digest).num_rows["train"]
    extension = ExtensionSpec(step=step, position=position, **{unit: length})
    longer = run.spec.extended(extension)
    log.warning(
        "run %r is extended from %d to %d %s: %d to %d steps, of which %d are done; the learning rate follows the schedule "
        "%s of the new length from here on, and may rise",
        run.id, now, length, unit, run.spec.total_steps(num_rows), longer.total_steps(num_rows), step,
        run.spec.schedule.name,
    )  # fmt: skip
    Runs(store).record(run.id, {"type": "extended", **extension.model_dump(mode="json")})


def with_length(spec: TrainSpec, run: RunRecord) -> TrainSpec:
    """The spec with the current length of a run, if it has the one of the run's start or of an extension."""
    if (spec.epochs, spec.steps) not in run.lengths:
        return spec
    current = {"epochs": run.spec.epochs, "steps": run.spec.steps, "extensions": run.spec.extensions}
    return spec.model_copy(update=current)


def describe_length(spec: TrainSpec) -> str:
    """The length of a run, for messages."""
    return f"{spec.steps} steps" if spec.steps is not None else f"{spec.epochs or DEFAULT_EPOCHS} epochs"


def is_length(changed: Sequence[str]) -> bool:
    """Whether the changed fields of a spec are its length alone."""
    return bool(changed) and set(changed) <= {"epochs", "steps"}
