"""Starts a run's workers with Ray Train and watches them to the end. The only file that knows ray.train.

Runs in the process of the run's board. `TorchTrainer.fit()` would do the same in more time: on two cores, 2 workers,
most of it imports (seconds of CPU time, each measured):
- it and its `TorchConfig` import torch in the driver and in the controller's process (2.1 each); `ProcessGroup` below
  needs none before the workers,
- the controller gets a process of its own (0.6 to import Ray, 1.2 for Ray Train) when the driver calls `fit`; the
  board's is there and has imported both while the driver read the data,
- the controller and the workers get a runtime environment for Ray Train's variables, and a process with one starts
  twice as slowly (2.3 more): first a program that imports Ray to set it. All processes of the cluster have these
  variables already, from the environment of `ray start` (maas_ray/cluster/environment.py),
- Ray Data gets a process to hand out shards (1.9), of which there are none,
- a guard in one more process (1.8) frees the workers' resources should the controller die and its driver live on.
  Here the driver asks the board to `stop`; only what a board leaves that was killed is held until the driver ends.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.fs
import ray
from ray.train import BackendConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from maas_ray.errors import MaasError, TrainingFailed
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train import group
from maas_ray.train.board import Launch

_LEAVE_S = 30.0
"""Longest wait for ranks to leave the group; what a dead one holds is gone with its process."""
_running: list[TrainController] = []


def launch(job: Launch, board: Any) -> MaasError | None:
    """Runs all attempts of a run; returns what ended the last one, or None.

    Args:
        job: the run.
        board: the actor in whose process this is called.
    """
    filesystem, path = _ray_storage(open_store(job.storage), job.storage)
    trainer = _Trainer(
        _worker(job, board),
        backend_config=ProcessGroup("nccl" if job.gpus else "gloo", job.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=job.count,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus, **({"GPU": 1} if job.gpus else {})},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.max_restarts),
        ),
    )
    try:
        trainer.fit()
        return None
    except TrainingFailedError as error:
        return _explain(job, error)
    finally:
        _forget(filesystem, f"{path}/{job.name}")


def stop() -> None:
    """Ends the workers of a launch that goes on, and frees what they hold."""
    for controller in _running:
        if (workers := controller.get_worker_group()) is not None:
            workers.abort()


@dataclass
class ProcessGroup(BackendConfig):  # type: ignore[misc]
    """Joins the workers to one process group of torch before they train."""

    backend: str
    timeout_s: float

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend


class _ProcessGroupBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True
    """Ranks of one machine see each other's GPUs, which NCCL needs for copies between them."""

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        workers = worker_group.get_workers()
        address = worker_group.execute_single(0, group.free_address, workers[0].metadata.node_ip)
        joined = []
        for rank, worker in enumerate(workers):
            place = worker.distributed_context
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(workers)),
                "LOCAL_RANK": str(place.local_rank),
                "LOCAL_WORLD_SIZE": str(place.local_world_size),
                "NODE_RANK": str(place.node_rank),
            }
            options = (address, backend_config.backend, rank, len(workers), backend_config.timeout_s, variables)
            joined.append(worker_group.execute_single_async(rank, group.join, *options))
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        ray.wait(worker_group.execute_async(group.leave), num_returns=len(worker_group), timeout=_LEAVE_S)


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        return dict(custom_runtime_env)  # without the variables that every process of the cluster was born with


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _WorkerGroup


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, DatasetsCallback | PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        controller = _Controller(**parts)
        _running.append(controller)
        try:
            asyncio.run(controller.run())
        finally:
            _running.remove(controller)
        return controller.get_result()


def _worker(job: Launch, board: Any) -> Callable[[], None]:
    """What each Ray Train worker runs. A closure, because Ray then sends only what it names, not this whole module."""

    def worker() -> None:
        import torch

        from maas_ray.train.spec import TrainSpec
        from maas_ray.train.worker import train_rank

        device = torch.device("cpu")
        if job.gpus:
            from ray.train.torch import get_device

            device = get_device()
        train_rank(TrainSpec.model_validate_json(job.spec), job.data_digest, board, device)

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


def _explain(job: Launch, error: Exception) -> MaasError:
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
            f"run {job.run!r} ended after {job.max_restarts} restarts; {first}; committed checkpoints are kept: "
            "mend the cause and give --resume"
        )
    return TrainingFailed(f"run {job.run!r} ended: {error}; committed checkpoints are kept: give --resume")
