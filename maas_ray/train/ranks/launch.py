"""Starts a run's workers with Ray Train and monitors them. The only file that uses ray.train, apart from its private
API in ray_internals/train.py.

Runs in the process of the run's actor. `TorchTrainer.fit()` would do the same but slower: on two cores with 2 workers,
most of the time is imports (seconds of CPU time, each measured):
- it and its `TorchConfig` import torch in the driver and in the controller's process (2.1 each); `_Meeting` below
  needs torch only in the workers,
- the controller gets a separate process (0.6 to import Ray, 1.2 for Ray Train) when the driver calls `fit`; the
  actor's process exists and has imported both while the driver read the data,
- the controller and the workers get a runtime environment for Ray Train's variables, and a process with one starts
  twice as slowly (2.3 more), because a program that imports Ray sets it first. All processes of the cluster already
  have these variables, from the environment of `ray start` (maas_ray/cluster/node/environment.py),
- Ray Data gets a process to distribute shards (1.9), which do not exist here,
- `ray.train.report` gets a process for its barrier (2.1), which our workers do not call,
- a guard process (1.8) frees the workers' resources if the controller dies and its driver survives. Here the driver
  asks the actor to `stop`; only the resources of a killed actor are held until the driver ends,
- a watcher process polls for draining nodes. Here the controller polls itself, in `_Sizes`.

Waits that have no timeout in Ray Train, or one of minutes, have a timeout here: placement, start, joining, heartbeats,
leaving. Its policies are replaced (`_Sizes`, `_Restarts`): its elastic policy ignores complete replicas of a model and
resources in use by others, ends a group in the middle of a step, and retries a start forever.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.fs
import ray
from ray.train import BackendConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.placement_group import placement_group

from maas_ray.cluster.capacity.claims import claimed
from maas_ray.cluster.capacity.preflight import has_autoscaler
from maas_ray.display import get_logger
from maas_ray.errors import MaasError, RanksMissing, ResourcesMissing
from maas_ray.ray_internals.nodes import draining_nodes
from maas_ray.ray_internals.train import (
    BackendSetupCallback,
    DataParallelTrainer,
    DatasetsCallback,
    DefaultPlacementGroupHandle,
    FailureDecision,
    FailurePolicy,
    InitializingState,
    NoopDecision,
    PlacementGroupCleanerCallback,
    PreemptionCallback,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
    TrainController,
    TrainControllerLoopIterationResult,
    WorkerGroup,
    WorkerGroupCallback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    propagated_callbacks,
    start_no_barrier,
)
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.ranks import process_group
from maas_ray.train.ranks.capacity import find_room, round_down
from maas_ray.train.ranks.failure_causes import explain, find_cause, has_waited_out, preempted
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.run_actor import Launch

_START_S = 60.0
"""Timeout for placed workers to start, and again for them to import torch and to join a process group."""
_LEAVE_S = 5.0
"""Timeout for ranks to leave the group; the resources of a dead rank are freed with its process."""
_SILENT_S = 30.0
"""Heartbeat timeout of a rank, unless `timeout_s` is shorter."""
_SETTLE_S = 2.0
"""Time for the resources of lost workers to become free, and for several ranks to report their timeouts."""
_PLACE_S = 10.0
"""Timeout for the placement on resources that were free a moment ago."""
_POLL_S = 0.25
_NODES_S = 1.0
"""Polling interval of the cluster's nodes."""
_RELEASE = ResizeDecision(num_workers=0, resources_per_worker={})
"""Ends a group that has left before the next one has resources: a draining node ends once its workers have ended."""
_running: list[TrainController] = []

log = get_logger(__name__)


def launch(job: Launch, actor: Any, ranks: RankRegistry) -> MaasError | None:
    """Runs all attempts of a run; returns the error of the last one, or None.

    Args:
        job: the run.
        actor: the actor of this process.
        ranks: registry that receives the ranks' heartbeats through the actor.
    """
    filesystem, path = _ray_storage(open_store(job.storage), job.storage)
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
        return explain(job, error)
    finally:
        ranks.end("the run is over")
        _forget(filesystem, f"{path}/{job.name}")


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


class _Meeting(WorkerGroupCallback):  # type: ignore[misc]
    """Creates the torch process group of the workers before training, and adds them to the registry."""

    def __init__(self, job: Launch, ranks: RankRegistry) -> None:
        self._job = job
        self._ranks = ranks
        self.together = job.together

    def after_worker_group_start(self, worker_group: "_WorkerGroup") -> None:
        workers = worker_group.get_workers()
        attempt = self._ranks.begin(
            [f"process {worker.metadata.pid} on {worker.metadata.node_ip}" for worker in workers]
        )
        found = worker_group.execute_single_async(0, process_group.free_address, workers[0].metadata.node_ip)
        address = self._gather({found: 0}, "chose no port")[0]
        joined = {}
        for rank, worker in enumerate(workers):
            place = worker.distributed_context
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(workers)),
                "LOCAL_RANK": str(place.local_rank),
                "LOCAL_WORLD_SIZE": str(place.local_world_size),
                "NODE_RANK": str(place.node_rank),
            }
            backend = "nccl" if self._job.gpus else "gloo"
            options = (address, backend, rank, len(workers), self._job.timeout_s, variables, attempt)
            joined[worker_group.execute_single_async(rank, process_group.join, *options)] = rank
        self._gather(joined, "did not join the group")
        self._ranks.joined()
        worker_group.watch()

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        ray.wait(worker_group.execute_async(process_group.leave), num_returns=len(worker_group), timeout=_LEAVE_S)

    def _gather(self, awaited: Mapping[Any, int], failing: str) -> dict[int, Any]:
        """The result of each rank. Raises as soon as one fails, and reports those that take longer than `_START_S`."""
        deadline, answers, open_refs = time.monotonic() + _START_S, {}, list(awaited)
        while open_refs:
            done, open_refs = ray.wait(open_refs, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = {
                    awaited[ref]: RanksMissing(
                        f"rank {awaited[ref]} {failing} within {_START_S:g} s ({self._ranks.describe(awaited[ref])})"
                    )
                    for ref in open_refs
                }
                raise WorkerGroupError("; ".join(map(str, late.values())), late)
            answers.update({awaited[ref]: ray.get(ref) for ref in done})
        return answers


start_no_barrier()


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    def __init__(self, *context: Any, **options: Any) -> None:
        super().__init__(*context, **options)
        self._together = next(one.together for one in self._callbacks if isinstance(one, _Meeting))
        self._worker_group_start_timeout_s = _PLACE_S
        self._placed: Any = None
        self._too_slow: threading.Timer | None = None

    def watch(self) -> None:
        """Aborts the start unless it ends, or this is called again, within `_START_S`."""
        self._unwatch()
        self._too_slow = threading.Timer(
            _START_S, self._placed.shutdown
        )  # ends the workers, and with them every wait for one
        self._too_slow.daemon = True
        self._too_slow.start()

    def _unwatch(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        return dict(custom_runtime_env)  # without the variables that every process of the cluster already has

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self.has_started():  # Ray Train would leave the workers running and their resources reserved
                self._worker_group_state.shutdown()
                self._clear_state()
            raise
        finally:
            self._unwatch()

    def _create_placement_group(self, scaling_config: ScalingConfig, context: Any) -> Any:
        # Ray reserves resources worker by worker, and may place three on one node and the fourth on another. Workers
        # that must share a node are reserved as one bundle, which is always on one node.
        room = {name: amount * self._together for name, amount in context.resources_per_worker.items()}
        bundles = [room] * (context.num_workers // self._together)
        self._placed = DefaultPlacementGroupHandle(placement_group(bundles, strategy=context.placement_strategy))
        return self._placed

    def _create_workers(self, num_workers: int, *context: Any, **options: Any) -> Any:
        self.watch()
        # Ranks are ordered by node, so that the workers of one bundle get adjacent ranks, as in the mesh.
        pieces = [worker // self._together for worker in range(num_workers)]
        return super()._create_workers(num_workers, *context, **{**options, "placement_group_bundle_indices": pieces})

    def _init_train_context_on_workers(self, *context: Any) -> None:
        super()._init_train_context_on_workers(*context)
        self._unwatch()  # from here on `_Meeting` has the timeouts


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _WorkerGroup

    def __init__(self, job: Launch, ranks: RankRegistry, **parts: Any) -> None:
        self._job = job
        self._ranks = ranks
        self._sizes = _Sizes(job, ranks, self.held)
        policies = {"scaling_policy": self._sizes, "failure_policy": _Restarts(job, ranks)}
        super().__init__(**{**parts, **policies})
        propagated = propagated_callbacks(self)
        propagated[:] = [one for one in propagated if not isinstance(one, PreemptionCallback)]

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> Any:
        return super()._start_worker_group(self._sizes.after_claims(num_workers), resources_per_worker)

    def held(self) -> Counter[str]:
        """Number of workers of the group on each node, by its id, including dead ones."""
        found = self.get_worker_group()
        workers = found.get_workers() if found is not None and found.has_started() else []
        return Counter(worker.metadata.node_id for worker in workers)

    def _execute_resize_decision(self, decision: ResizeDecision) -> Any:
        if decision is not _RELEASE:
            return super()._execute_resize_decision(decision)
        self._shutdown_worker_group()
        return TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(), previous_state=self._state, next_state=InitializingState()
        )

    async def _poll_workers(self) -> Any:
        status = await super()._poll_workers()
        if any(has_waited_out(each.error) for each in status.worker_statuses.values()):
            await asyncio.sleep(_SETTLE_S)
            status = await super()._poll_workers()
            # A rank that is still running while others timed out is the one that they waited for.
            late = [rank for rank, each in status.worker_statuses.items() if each.error is None and each.running]
            missing = {rank: f"others waited for it; {self._ranks.describe(rank)}" for rank in late}
        else:
            missing = self._ranks.silent(min(_SILENT_S, self._job.timeout_s), _START_S)
        for rank, what in missing.items():
            each = status.worker_statuses[rank]
            each.error = each.error or RanksMissing(f"rank {rank} is missing: {what}")
        return status

    def _is_training_succeeded(self, status: Any) -> bool:
        return TrainController._is_training_succeeded(status) and not self._ranks.has_left


class _Sizes(ScalingPolicy):  # type: ignore[misc]
    """Decides the number of workers, and when it changes: at a committed step, or after a loss."""

    def __init__(self, job: Launch, ranks: RankRegistry, held: Callable[[], Counter[str]]) -> None:
        super().__init__(ScalingConfig(num_workers=job.sizes[-1], resources_per_worker=dict(job.resources)))
        self._job = job
        self._ranks = ranks
        self._held = held
        self._waiting_since: float | None = None
        self._looked = time.monotonic()
        self._asked_nodes = time.monotonic()
        self._has_autoscaler = False
        self._request: threading.Thread | None = None

    def _get_num_workers_for_resource_request(self) -> int:
        return self._job.sizes[-1]

    # Ray sends requests to the autoscaler through one actor of the cluster, on the node of the first driver with a
    # request. After the loss of that node each request times out after 5 s: here it only delays other requests.

    def _send_resource_request(self) -> None:
        self._has_autoscaler = has_autoscaler()
        self._maybe_send_resource_request()

    def _maybe_send_resource_request(self) -> None:
        if self._has_autoscaler and (self._request is None or not self._request.is_alive()):
            self._request = threading.Thread(target=super()._maybe_send_resource_request, daemon=True)
            self._request.start()

    def _cancel_resource_request(self) -> None:
        if self._request is not None:
            super()._cancel_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self._ranks.final is not None:
            raise preempted(self._job, self._ranks)
        self._maybe_send_resource_request()
        waited = self._waited()
        size = self._size()
        if size == self._job.sizes[-1] or (size and waited >= _SETTLE_S):
            self._looked = time.monotonic()
            return ResizeDecision(num_workers=size, resources_per_worker=dict(self._job.resources))
        if waited > self._job.placement_timeout_s:
            each = f", each {self._job.together} of them on one node," if self._job.together > 1 else ""
            raise ResourcesMissing(
                f"run {self._job.run!r}: no free resources for {self._job.sizes[0]} workers of "
                f"{dict(self._job.resources)}{each} within workers.placement_timeout_s "
                f"{self._job.placement_timeout_s:g} s; committed checkpoints are kept: continue with --resume once "
                "resources are free"
            )
        time.sleep(_POLL_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        if self._ranks.has_left:
            decision = self.make_decision_for_non_running_worker_group()
            if isinstance(decision, NoopDecision) and self._waited() >= _SETTLE_S:
                decision = _RELEASE
            if isinstance(decision, ResizeDecision):
                self._ranks.end(self._ranks.asked or "")
            return decision
        self._waiting_since = None
        self._maybe_send_resource_request()
        try:
            if self._ranks.asked is None and (reason := self._reason(worker_group_state.num_workers)):
                self._ranks.ask(reason)
        except (
            ray.exceptions.RpcError
        ) as error:  # the head node is unreachable; ranks continue without it, and the request is repeated
            log.warning("the cluster's head node does not answer: %s", error)
        return NoopDecision()

    def after_claims(self, num_workers: int) -> int:
        """The number of workers to start. Waits without a timeout while serving claims resources, then for free ones.

        Called after the old workers have ended and freed their resources.
        """
        if claimed() is None:
            return num_workers
        while claimed() is not None or not (num_workers := self._size()):
            if self._ranks.final is not None:
                raise preempted(self._job, self._ranks)
            time.sleep(_POLL_S)
        self._looked = time.monotonic()
        return num_workers

    def _waited(self) -> float:
        """Seconds since the run started to wait for resources."""
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        return now - self._waiting_since

    def _size(self) -> int:
        job = self._job
        return round_down(find_room(job.resources, self._held(), job.sizes[-1], job.together), job.sizes)

    def _reason(self, num_workers: int) -> str | None:
        """The reason why the workers should restart, or None."""
        now = time.monotonic()
        if now - self._asked_nodes < _NODES_S:
            return None
        self._asked_nodes = now
        if going := draining_nodes() & self._held().keys():
            return f"node {min(going)[:12]} is draining"
        if who := claimed():
            return f"{who} claims resources"
        if num_workers < self._job.sizes[-1] and now - self._looked >= self._job.scale_up_interval_s:
            self._looked = now
            if (size := self._size()) > num_workers:
                return f"resources for {size} workers are free"
        return None


class _Restarts(FailurePolicy):  # type: ignore[misc]
    """Restarts after a loss, up to a number of consecutive times; a new committed checkpoint resets the count."""

    def __init__(self, job: Launch, ranks: RankRegistry) -> None:
        super().__init__(FailureConfig(max_failures=job.max_restarts))
        self._job = job
        self._ranks = ranks
        self._losses = 0
        self._committed = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY  # others took the resources; `_Sizes` has the timeout
        rank, found = find_cause(training_failed_error)
        self._ranks.end(f"{'' if rank is None else f'rank {rank}: '}{str(found).partition(chr(10))[0]}")
        if isinstance(training_failed_error, ControllerError) and not isinstance(
            cause, WorkerGroupStartupFailedError | ray.exceptions.RayActorError
        ):
            return FailureDecision.RAISE
        if isinstance(found, MaasError) and not found.retryable:
            return FailureDecision.RAISE  # it would recur
        if self._ranks.committed > self._committed:
            self._losses, self._committed = 0, self._ranks.committed
        self._losses += 1
        return FailureDecision.RETRY if self._losses <= self._job.max_restarts else FailureDecision.RAISE


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    job: Launch
    ranks: RankRegistry

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        unused = DatasetsCallback | PlacementGroupCleanerCallback | BackendSetupCallback
        return [*(one for one in callbacks if not isinstance(one, unused)), _Meeting(self.job, self.ranks)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        controller = _Controller(self.job, self.ranks, **parts)
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


def _ray_storage(store: ObstoreStore, storage: StorageSpec) -> tuple[pyarrow.fs.FileSystem, str]:
    """Location of Ray Train's own files during an attempt: in the run's store, which every node can reach."""
    if store.root is not None:
        return pyarrow.fs.LocalFileSystem(), str(store.root / "ray")
    if storage.uri.startswith("s3://") and storage.endpoint:
        scheme, _, host = storage.endpoint.partition("://")
        host = host.rpartition("@")[2]  # requests are signed; the user info would only be shown in the dashboard
        filesystem = pyarrow.fs.S3FileSystem(
            endpoint_override=host, scheme=scheme, region=storage.region or "us-east-1"
        )
        return filesystem, f"{storage.uri.removeprefix('s3://').rstrip('/')}/ray"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage.uri)
    return filesystem, f"{path.rstrip('/')}/ray"


def _forget(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)
