"""A training run on Ray Train: prepares, starts the workers, follows them. The only file that knows ray.train.

Ray Train starts the process group and starts it again when a worker or node is lost. Checkpoints are ours
(train/checkpoint.py): every attempt begins from the newest committed one, so a restart, a resume by hand and an
undisturbed run compute the same numbers.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from maas_ray.cluster.preflight import preflight
from maas_ray.data.dataset import Dataset
from maas_ray.data.prepare import prepare
from maas_ray.errors import Conflict, MaasError, NotFound, SpecError, TrainingFailed
from maas_ray.models.build import build_model
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.store.probe import probe
from maas_ray.train.board import TIMEOUT_S, open_board
from maas_ray.train.checkpoint import load_checkpoint
from maas_ray.train.classical.run import check_classical, fit_classical
from maas_ray.train.classical.state import load_fitted
from maas_ray.train.journal import location
from maas_ray.train.optimizer import build_optimizer, build_schedule
from maas_ray.train.progress import Progress
from maas_ray.train.runs import Run, Runs, git_commit
from maas_ray.train.spec import TrainSpec
from maas_ray.train.worker import train_rank


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    run: str
    step: int
    metrics: dict[str, float]
    """The newest `loss`, and `validation_…` figures where there is a validation split."""
    data_digest: str
    checkpoint_step: int
    tensorboard: str
    """What to give `tensorboard --logdir`."""


def run_training(
    spec: TrainSpec, *, resume: bool = False, on_progress: Callable[[Progress], None] | None = None
) -> RunResult:
    """Trains a run to its end. Needs a connected Ray (`ray.init`).

    Args:
        spec: the run.
        resume: continue a run that exists from its newest committed checkpoint; one that is finished is left alone.
        on_progress: called in a thread of this process with the newest report of rank 0.

    Raises:
        Conflict: the run exists and `resume` is false.
        NotFound: `resume` is true and there is no such run.
        SpecError: `resume` is true and the spec would make another training of it.
        ResourcesMissing: the cluster can never hold the workers.
        DataError, ModelError: the data or the model do not fit the spec.
        StoreError: the store is not usable.
        TrainingFailed: a worker failed more often than `workers.max_restarts`.
    """
    store = open_store(spec.storage)
    probe(store)
    # Workers run in other directories, perhaps on other machines: give them the absolute location.
    spec = spec.model_copy(update={"storage": spec.storage.model_copy(update={"uri": store.uri})})
    preflight(spec.workers.count, {"CPU": spec.workers.cpus, "GPU": spec.workers.gpus})
    run = _resumed(store, spec) if resume else _created(store, spec)
    if run.status != "finished":
        (fit_classical if spec.model.is_classical else _fit)(store, spec, run, on_progress)
    return _result(store, spec.run)


def _created(store: ObstoreStore, spec: TrainSpec) -> Run:
    runs = Runs(store)
    try:
        runs.get(spec.run)
    except NotFound:
        dataset = prepare(spec.data, store)
        _check(spec, dataset)
        return runs.create(spec, dataset.digest, git_commit(Path.cwd()))
    raise Conflict(f"a run {spec.run!r} exists in {store.uri}; give --resume to continue it, or choose another name")


def _resumed(store: ObstoreStore, spec: TrainSpec) -> Run:
    run = Runs(store).get(spec.run)
    if changed := run.spec.same_training(spec):
        raise SpecError(
            f"run {spec.run!r} was started with other values of {', '.join(changed)}; resuming it with these would be "
            "another training: take them back, or choose another run name"
        )
    return run


def _check(spec: TrainSpec, dataset: Dataset) -> None:
    """Builds everything once here, so that what is wrong with it is said before any worker starts."""
    if spec.model.is_classical:
        return check_classical(spec, dataset)
    torch.manual_seed(spec.seed)
    net = build_model(
        spec.model, dataset.features.row, dataset.features.num_outputs, per_token=dataset.features.is_per_token
    )
    build_schedule(spec.schedule, build_optimizer(spec.optimizer, net), spec.total_steps(dataset.num_rows["train"]))


def _fit(store: ObstoreStore, spec: TrainSpec, run: Run, on_progress: Callable[[Progress], None] | None) -> None:
    runs = Runs(store)
    runs.record(run.id, {"type": "started", "workers": spec.workers.count})
    filesystem, path = _ray_storage(store, spec.storage)
    name = f"{run.id}-{uuid.uuid4().hex[:8]}"  # Ray would silently resume its own state under a name it has seen
    with open_board(on_progress) as board:
        trainer = TorchTrainer(
            _worker(spec, run.data_digest, board),
            torch_config=TorchConfig(timeout_s=int(spec.workers.timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=spec.workers.count,
                use_gpu=spec.workers.gpus > 0,
                resources_per_worker={"CPU": spec.workers.cpus, **({"GPU": 1} if spec.workers.gpus else {})},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=spec.workers.max_restarts),
            ),
        )
        failure: MaasError | None
        try:
            trainer.fit()
            failure = ray.get(board.failure.remote(), timeout=TIMEOUT_S)
        except TrainingFailedError as error:
            failure = _explain(spec, error)
        finally:
            _forget(filesystem, f"{path}/{name}")
        if failure is not None:
            runs.record(run.id, {"type": "failed", "error": f"{failure.code}: {failure}"})
            raise failure
    state = load_checkpoint(store, run.id)
    runs.record(run.id, {"type": "finished", "step": state.step})


def _result(store: ObstoreStore, run: str) -> RunResult:
    record = Runs(store).get(run)
    state = load_fitted(store, run) if record.spec.model.is_classical else load_checkpoint(store, run)
    metrics: dict[str, float] = {}
    for entry in state.history:
        metrics.update({"loss": entry["loss"]} if "loss" in entry else {})
        metrics.update({f"validation_{name}": value for name, value in entry.get("validation", {}).items()})
    return RunResult(run, state.step, metrics, record.data_digest, state.step, location(store, run))


def _worker(spec: TrainSpec, data_digest: str, board: Any) -> Callable[[], None]:
    """What each Ray Train worker runs. A closure, because Ray then sends only what it names, not this whole module."""

    def worker() -> None:
        train_rank(spec, data_digest, board, get_device())

    return worker


def _ray_storage(store: ObstoreStore, storage: StorageSpec) -> tuple[pyarrow.fs.FileSystem, str]:
    """Where Ray Train keeps its own notes during an attempt: beside ours, since every node must reach them."""
    if store.root is not None:
        return pyarrow.fs.LocalFileSystem(), str(store.root / "ray")
    if storage.uri.startswith("s3://") and storage.endpoint:
        scheme, _, host = storage.endpoint.partition("://")
        filesystem = pyarrow.fs.S3FileSystem(
            endpoint_override=host, scheme=scheme, region=storage.region or "us-east-1"
        )
        return filesystem, f"{storage.uri.removeprefix('s3://').rstrip('/')}/ray"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage.uri)
    return filesystem, f"{path.rstrip('/')}/ray"


def _forget(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)


def _explain(spec: TrainSpec, error: Exception) -> MaasError:
    """The worker's own error if it is one of ours, else a summary that names rank and cause."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "base_exc", None) or failure.__cause__ or failure
        if isinstance(cause, MaasError):
            return cause
        if rank == min(failures):
            first = f"rank {rank}: {type(cause).__name__}: {cause}"
    if failures:
        return TrainingFailed(
            f"run {spec.run!r} ended after {spec.workers.max_restarts} restarts; {first}; committed checkpoints are kept: "
            "mend the cause and give --resume"
        )
    return TrainingFailed(f"run {spec.run!r} ended: {error}; committed checkpoints are kept: give --resume")
