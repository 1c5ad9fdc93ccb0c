"""Trains a run: prepares the data, starts the workers (train/ranks/ray_train), follows them. Independent of ray.train.

Ray Train starts the process group, and restarts it after the loss of a worker or node. Checkpoints are ours
(checkpoint/): every attempt starts from the newest committed one, so that a restart, a resumed run and an uninterrupted
run compute the same numbers. One process at a time holds the run's lease (store/lease.py): without it no process can
start, continue or commit to the run.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maas_ray.checkpoint.catalog import open_checkpoint, read_saved
from maas_ray.cluster.capacity.preflight import alive_nodes, preflight
from maas_ray.cluster.health.clocks import refuse_skew
from maas_ray.data.prepare import prepare
from maas_ray.data.spec.augmentation import refuse_augmentation
from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.data.table.data_profile import data_lines
from maas_ray.display import get_logger
from maas_ray.errors import Conflict, NotFound, SpecError
from maas_ray.store.lease import Lease, holder_of, is_dead, take
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.store.probe import probe
from maas_ray.train.callbacks.tensorboard import location
from maas_ray.train.classical.run import check_classical, fit_classical
from maas_ray.train.classical.state import load_fitted
from maas_ray.train.loop.progress import Progress
from maas_ray.train.ranks.follow import fit_ranks
from maas_ray.train.ranks.run_actor import end_run_actor, start_run_actor
from maas_ray.train.records.code_version import git_commit
from maas_ray.train.records.extension import describe_length, extend_run, is_length, with_length
from maas_ray.train.records.report import FinalState, commit_report, find_part
from maas_ray.train.records.runs import RunRecord, Runs, checkpoints_prefix, run_prefix
from maas_ray.train.spec.class_weights import resolve_weights
from maas_ray.train.spec.metrics import newest_metrics, refuse_metric
from maas_ray.train.spec.schedule import refuse_plateau, refuse_steps
from maas_ray.train.spec.threshold import refuse_threshold
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.async_validation import check_validation_resources
from maas_ray.train.validation.export_check import check_names

_TAKEN = "wait for it, or choose another run name; if that process is dead, --resume takes over the run"
_TAKEN_RESUMED = "that process is alive: wait for it, or end it first"

log = get_logger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    run: str
    step: int
    metrics: dict[str, float]
    """The newest `loss`, and `validation_…` metrics if the data has a validation split."""
    data_digest: str
    checkpoint_step: int
    reason: str | None
    """Reason for an end before the last step, or None."""
    tensorboard: str
    """The value of `tensorboard --logdir`."""
    report: dict[str, str]
    """Locations of `report.json` and `report.png`; see records/report.py."""
    unvalidated: Mapping[int, str]
    """Reasons why asynchronous validation has no metrics, by step."""
    data: Sequence[str] = ()
    """The report of the data as lines; report.json has all of it."""


def run_training(
    spec: TrainSpec,
    *,
    resume: bool = False,
    extend: Mapping[str, int] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_data: Callable[[Sequence[str]], None] | None = None,
    actor: Any = None,
) -> RunResult:
    """Trains a run to its end. Needs a connected Ray (`ray.init`).

    Args:
        spec: the run.
        resume: continue an existing run from its newest committed checkpoint; a finished run is not changed.
        extend: `{"epochs": N}` or `{"steps": N}`: continue an existing run, also a finished one, to this larger total
            length. The order of samples continues; the schedule is that of a run of the new length.
        on_progress: called with the latest report of rank 0, in a thread of this process.
        on_data: called with the report of the data as lines, before a new run starts.
        actor: result of `start_run_actor()`, called before reading the spec so that the actor imports Ray Train
            meanwhile. It ends with the run. By default the run starts an actor.

    Raises:
        Conflict: the run exists and `resume` is False; or another process trains it or has taken it over.
        NotFound: `resume` is True and the run does not exist.
        SpecError: `resume` is True and the spec differs from that of the run, or `extend` is not a larger length.
        ResourcesMissing: the cluster can never provide the resources of the workers.
        DataError, ModelError: the data or the model does not match the spec.
        StoreError: the store is not usable.
        TrainingFailed: workers failed more than `workers.max_restarts` times in a row.
        Preempted: this process received SIGTERM, SIGINT or SIGHUP and committed a checkpoint. A second signal has its
            default effect; earlier checkpoints remain.
    """
    actor = actor or start_run_actor()
    try:
        return _run_training(spec, resume or extend is not None, extend, on_progress, on_data, actor)
    finally:
        end_run_actor(actor)


def _run_training(
    spec: TrainSpec,
    resume: bool,
    extend: Mapping[str, int] | None,
    on_progress: Callable[[Progress], None] | None,
    on_data: Callable[[Sequence[str]], None] | None,
    actor: Any,
) -> RunResult:
    store = open_store(spec.storage)
    probe(store)
    # Workers run in other directories, possibly on other machines: they need the absolute location.
    spec = spec.model_copy(update={"storage": spec.storage.model_copy(update={"uri": store.uri})})
    resources = {"CPU": spec.workers.cpus, "GPU": spec.workers.gpus}
    # A resumed run had enough nodes: one of them may be restarting.
    wait_s = spec.workers.placement_timeout_s if resume else 0.0
    preflight(spec.layouts()[0].world, resources, together=spec.parallelism.together, wait_s=wait_s)
    refuse_skew()
    if spec.validation.is_async:
        check_validation_resources(spec)
    if resume and _resumed(store, spec).status == "finished" and extend is None:
        return _result(store, spec.run)
    if not resume:
        _refuse_existing(store, spec)
        if spec.export_check != "off" and not spec.model.is_classical:
            actor.prepare_export_check.remote()  # imports the exporter while the data is prepared
    what, hint = f"run {spec.run!r} of {store.uri}", _TAKEN_RESUMED if resume else _TAKEN
    with take(store, run_prefix(spec.run), what, waits=resume, hint=hint, on_wait=log.warning) as lease:
        if extend is not None:
            extend_run(store, _resumed(store, spec), spec, extend)
        if resume:
            _resume(store, spec, on_progress, actor, lease)
        else:
            _begin(store, spec, on_progress, on_data, actor, lease)
        return _result(store, spec.run)


def _resume(
    store: ObstoreStore, spec: TrainSpec, on_progress: Callable[[Progress], None] | None, actor: Any, lease: Lease
) -> None:
    run = _resumed(store, spec)  # again: the previous holder of the lease may have continued meanwhile
    # All attempts start from the same weights. The caller's location is preferred: stored ones contain no passwords.
    init = spec.init.as_settled(run.spec.init) if spec.init is not None else run.spec.init
    spec = with_length(spec, run).model_copy(update={"init": init})
    if run.status == "finished":
        return
    if spec.model.is_classical:
        fit_classical(store, spec, run, on_progress, lease.claim)
    else:
        fit_ranks(store, spec, run.data_digest, on_progress, actor, lease)


def _begin(
    store: ObstoreStore,
    spec: TrainSpec,
    on_progress: Callable[[Progress], None] | None,
    on_data: Callable[[Sequence[str]], None] | None,
    actor: Any,
    lease: Lease,
) -> None:
    _refuse_existing(store, spec)
    if spec.extensions:
        raise SpecError("extensions: a new run has none; set epochs or steps to the whole length")
    dataset = prepare(spec.data, store)
    if on_data is not None:
        on_data(data_lines(dataset.profile, dataset.report))
    spec, lineage = _settled(store, spec)

    def create() -> RunRecord:
        lease.check()
        return Runs(store).create(spec, dataset.digest, git_commit(Path.cwd()), lineage)

    if spec.model.is_classical:
        check_classical(spec, dataset)
        check_names(spec, dataset.features)
        fit_classical(store, spec, create(), on_progress, lease.claim)
    else:
        _check(spec, dataset)
        fit_ranks(store, spec, dataset.digest, on_progress, actor, lease, create)


def _refuse_existing(store: ObstoreStore, spec: TrainSpec) -> None:
    try:
        Runs(store).get(spec.run)
    except NotFound:
        return
    exists = f"run {spec.run!r} already exists in {store.uri}"
    holder = holder_of(store, run_prefix(spec.run))
    if holder is not None and not is_dead(holder):
        raise Conflict(f"{exists}, in use by {holder}; {_TAKEN}")
    raise Conflict(f"{exists}; continue it with --resume, or choose another run name")


def _settled(store: ObstoreStore, spec: TrainSpec) -> tuple[TrainSpec, Any]:
    """The spec with the exact checkpoint that the run starts from, and its lineage; unchanged for most runs."""
    if spec.init is None:
        return spec, None
    from maas_ray.train.state.warm_start import open_start, settle_init  # late: few runs need it

    init = settle_init(spec.init, store)
    return spec.model_copy(update={"init": init}), open_start(init, store, spec.storage).lineage()


def _resumed(store: ObstoreStore, spec: TrainSpec) -> RunRecord:
    run = Runs(store).get(spec.run)
    if spec.init is not None:
        spec = spec.model_copy(update={"init": spec.init.as_settled(run.spec.init)})
    changed = run.spec.same_training(with_length(spec, run))
    if is_length(changed):
        raise SpecError(
            f"run {spec.run!r} has {describe_length(run.spec)}, but the spec has {describe_length(spec)}; restore its length, "
            f"or train the run longer with --extend {spec.unit}=N"
        )
    if changed:
        raise SpecError(
            f"run {spec.run!r} was started with other values of {', '.join(changed)}, so that the spec describes another "
            "training; restore these values, or start a run with another name, from these weights with "
            f"init: {{run: {spec.run}}}"
        )
    return run


def _check(spec: TrainSpec, dataset: Dataset) -> None:
    """Checks that need no torch, before any worker starts. Rank 0 makes the others, see train/ranks/preflight.py."""
    if dataset.features.labels is not None and spec.objective.class_weights is not None:
        counts = dataset.count_classes().tolist() if spec.objective.class_weights == "balanced" else None
        resolve_weights(spec.objective.class_weights, dataset.features.labels, counts)
    if spec.augmentation is not None:
        refuse_augmentation(spec.augmentation, dataset.features)
    refuse_steps(spec.schedule, spec.total_steps(dataset.num_rows["train"]))
    task, has_validation = dataset.features.task, bool(dataset.num_rows.get("validation"))
    refuse_threshold(spec.objective.threshold, task, has_validation)
    if spec.validation.is_async and not has_validation:
        raise SpecError(
            "validation.mode async needs a validation split; set data.split.validation, or remove validation.mode"
        )
    own = [metric.label for metric in spec.metrics]
    for field, metric, mode in spec.followed_metrics():
        if field == "schedule":
            refuse_plateau(metric, has_validation)
        refuse_metric(field, metric, mode, task, has_validation, own)


def _result(store: ObstoreStore, run: str) -> RunResult:
    record = Runs(store).get(run)
    if record.spec.model.is_classical:
        fitted = load_fitted(store, run)
        ended = FinalState(fitted.step, fitted.history)
    else:
        saved = read_saved(open_checkpoint(store, checkpoints_prefix(run)))
        ended = FinalState(saved.step, saved.history, saved.meta.get("layout"), saved.meta.get("seconds"))
    report = commit_report(store, run, ended, alive_nodes())
    metrics = {**newest_metrics(ended.history), **Runs(store).validated(run).get(ended.step, {})}
    return RunResult(
        run=run,
        step=ended.step,
        metrics=metrics,
        data_digest=record.data_digest,
        checkpoint_step=ended.step,
        reason=record.reason,
        tensorboard=location(store, run),
        report={name: find_part(report, name) for name in report.parts},
        unvalidated=record.unvalidated,
        data=_data_lines(store, record.data_digest),
    )


def _data_lines(store: ObstoreStore, digest: str) -> list[str]:
    with suppress(NotFound):  # removed after the training
        dataset = open_dataset(store, digest)
        return data_lines(dataset.profile, dataset.report)
    return []
