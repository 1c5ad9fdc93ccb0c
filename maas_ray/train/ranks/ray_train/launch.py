"""Starts a run's workers with Ray Train and monitors them. Only this folder uses ray.train, apart from its private API
in ray_internals/train.py.

Runs in the process of the run's actor. `TorchTrainer.fit()` would do the same but slower: on two cores with 2 workers,
most of the time is imports (seconds of CPU time, each measured):
- it and its `TorchConfig` import torch in the driver and in the controller's process (2.1 each); `Rendezvous` needs
  torch only in the workers,
- the controller gets a separate process (0.6 to import Ray, 1.2 for Ray Train) when the driver calls `fit`; the
  actor's process exists and has imported both while the driver read the data,
- the controller and the workers get a runtime environment for Ray Train's variables, and a process with one starts
  twice as slowly (2.3 more), because a program that imports Ray sets it first. All processes of the cluster already
  have these variables, from the environment of `ray start` (maas_ray/cluster/node/environment.py),
- Ray Data gets a process to distribute shards (1.9), which do not exist here,
- `ray.train.report` gets a process for its barrier (2.1), which our workers do not call,
- a guard process (1.8) frees the workers' resources if the controller dies and its driver survives. Here the driver
  asks the actor to `stop`; only the resources of a killed actor are held until the driver ends,
- a watcher process polls for draining nodes. Here the controller polls itself, in `ElasticScaling`.

Waits that have no timeout in Ray Train, or one of minutes, have a timeout here: placement, start, joining, heartbeats,
leaving. Its policies are replaced (`ElasticScaling`, `RestartPolicy`).
"""

import asyncio
from collections.abc import Callable
from typing import Any

from ray.train import BackendConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend

from maas_ray.errors import MaasError
from maas_ray.ray_internals.train import (
    BackendSetupCallback,
    DataParallelTrainer,
    DatasetsCallback,
    PlacementGroupCleanerCallback,
    TrainController,
    start_no_barrier,
)
from maas_ray.store.objects import open_store
from maas_ray.train.ranks.failure_causes import explain
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.ray_train.controller import RunController
from maas_ray.train.ranks.ray_train.storage import forget, ray_storage
from maas_ray.train.ranks.ray_train.worker_group import Rendezvous
from maas_ray.train.ranks.run_actor import Launch

_running: list[TrainController] = []

start_no_barrier()


def launch(job: Launch, actor: Any, ranks: RankRegistry) -> MaasError | None:
    """Runs all attempts of a run; returns the error of the last one, or None.

    Args:
        job: the run.
        actor: the actor of this process.
        ranks: registry that receives the ranks' heartbeats through the actor.
    """
    filesystem, path = ray_storage(open_store(job.storage), job.storage)
    trainer = _Trainer(
        _worker(job, actor),
        backend_config=_Gpus(),
        scaling_config=ScalingConfig(
            num_workers=job.sizes[-1], use_gpu=job.gpus > 0, resources_per_worker=dict(job.resources)
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.max_restarts),
        ),
    )
    trainer.job, trainer.ranks = job, ranks
    try:
        trainer.fit()
        return None
    except TrainingFailedError as error:
        return explain(job, error, ranks.past)
    finally:
        ranks.end("the run is over")
        forget(filesystem, f"{path}/{job.name}")


def stop() -> None:
    """Ends the workers of a running launch and frees their resources."""
    for controller in _running:
        if (workers := controller.get_worker_group()) is not None:
            workers.abort()


class _Gpus(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _SharedGpus


class _SharedGpus(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True
    """Ranks on one machine see each other's GPUs, which NCCL needs for copies between them."""


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    job: Launch
    ranks: RankRegistry

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        unused = DatasetsCallback | PlacementGroupCleanerCallback | BackendSetupCallback
        return [*(one for one in callbacks if not isinstance(one, unused)), Rendezvous(self.job, self.ranks)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        controller = RunController(self.job, self.ranks, **parts)
        _running.append(controller)
        try:
            asyncio.run(controller.run())
        finally:
            _running.remove(controller)
        return controller.get_result()


def _worker(job: Launch, actor: Any) -> Callable[[], None]:
    """The function of each Ray Train worker. A closure, since Ray then serializes only its names, not this module."""

    def worker() -> None:
        import torch

        from maas_ray.train.ranks.worker import train_rank
        from maas_ray.train.spec.train import TrainSpec

        device = torch.device("cpu")
        if job.gpus:
            from ray.train.torch import get_device

            device = get_device()
        train_rank(TrainSpec.model_validate_json(job.spec), job.data_digest, actor, device, job.claim)

    return worker
