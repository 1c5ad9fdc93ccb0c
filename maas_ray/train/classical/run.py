"""Runs a classical training on Ray, as one task. Imports neither scikit-learn nor skl2onnx."""

from collections.abc import Callable

import ray
from ray.exceptions import RayError, RayTaskError

from maas_ray.data.stored.dataset import Dataset
from maas_ray.errors import DataError, MaasError, ModelError, TrainingFailed
from maas_ray.models.classical import SvmSpec, parse_classical
from maas_ray.store.lease import Claim
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.progress import Progress
from maas_ray.train.records.runs import RunRecord, Runs
from maas_ray.train.spec.train import TrainSpec

TIMEOUT_S = 60.0
"""Timeout for the metrics of a finished task."""
POLL_S = 5.0
"""Interval at which the waiting driver checks for signals."""


def check_classical(spec: TrainSpec, dataset: Dataset) -> None:
    """Checks model and data before the task starts.

    Raises:
        SpecError: a parameter is invalid for the task.
        ModelError: rows are tokens.
        DataError: the data has more rows than the limit of the model.
    """
    name, features = spec.model.name, dataset.features
    params = parse_classical(name, spec.model.params, features.task)
    if features.row.is_tokens:
        raise ModelError(f"{name} needs rows of values, but the rows of the data are tokens; choose another model")
    num_rows = dataset.num_rows["train"]
    if isinstance(params, SvmSpec) and num_rows > params.max_rows:
        raise DataError(
            f"the training split has {num_rows} rows, the limit of {name} is {params.max_rows}, because its time grows "
            "with their square; raise model.params.max_rows, or choose gradient_boosting"
        )


def fit_classical(
    store: ObstoreStore,
    spec: TrainSpec,
    run: RunRecord,
    on_progress: Callable[[Progress], None] | None,
    claim: Claim | None = None,
) -> None:
    """Trains an existing run in one task with `workers.cpus` CPUs. After the loss of its process or node the task
    restarts, at most `workers.max_restarts` times; a resumed run restarts too, and both compute the same.

    Raises:
        MaasError: the error of the task.
        Conflict: another process has taken over the run.
        TrainingFailed: the task failed for another reason, or was lost too many times.
    """
    runs = Runs(store)
    runs.record(run.id, {"type": "started", "workers": 1})
    report = on_progress or (lambda _: None)
    report(Progress(step=0, total_steps=1, epoch=0.0))
    # By default a task runs in its caller's placement group, which has no CPU in a trial of Ray Tune.
    options = {"num_cpus": spec.workers.cpus, "max_retries": spec.workers.max_restarts}
    task = ray.remote(**options, scheduling_strategy="DEFAULT")(_train)
    reference = task.remote(spec, run.data_digest, claim)
    try:
        while not ray.wait([reference], timeout=POLL_S)[0]:
            pass  # fitting has no time limit; the loss of its process ends the wait
        progress: Progress = ray.get(reference, timeout=TIMEOUT_S)
    except RayError as error:
        failure = _explain(spec, error)
        if claim is not None:
            claim.check(store)
        runs.record(run.id, {"type": "failed", "error": f"{failure.code}: {failure}"})
        raise failure from error
    except BaseException:
        ray.cancel(reference, force=True)
        raise
    report(progress)
    if claim is not None:
        claim.check(store)
    runs.record(run.id, {"type": "finished", "step": progress.step, "metrics": progress.metrics})


def _train(spec: TrainSpec, data_digest: str, claim: Claim | None) -> Progress:
    from maas_ray.train.classical.fit import train_classical  # only in the task: scikit-learn is slow to import

    return train_classical(spec, data_digest, claim)


def _explain(spec: TrainSpec, error: RayError) -> MaasError:
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MaasError):
        return cause
    if isinstance(error, RayTaskError):
        return TrainingFailed(
            f"run {spec.run!r} failed: {type(cause).__name__}: {cause}; fix the cause and continue with --resume"
        )
    return TrainingFailed(
        f"the process that trained run {spec.run!r} was lost more than {spec.workers.max_restarts} times: "
        f"{type(error).__name__}: {error}; if it ran out of memory, use fewer rows or a smaller model; continue with "
        "--resume"
    )
