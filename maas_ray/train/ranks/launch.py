"""Starts a run's workers with Ray Train and watches them to the end. The only file that knows ray.train,
beside the private parts of it in ray_internals/train.py.

Runs in the process of the run's actor. `TorchTrainer.fit()` would do the same in more time: on two cores, 2 workers,
most of it imports (seconds of CPU time, each measured):
- it and its `TorchConfig` import torch in the driver and in the controller's process (2.1 each); `_Meeting` below
  needs none before the workers,
- the controller gets a process of its own (0.6 to import Ray, 1.2 for Ray Train) when the driver calls `fit`; the
  actor's is there and has imported both while the driver read the data,
- the controller and the workers get a runtime environment for Ray Train's variables, and a process with one starts
  twice as slowly (2.3 more): first a program that imports Ray to set it. All processes of the cluster have these
  variables already, from the environment of `ray start` (maas_ray/cluster/node/environment.py),
- Ray Data gets a process to hand out shards (1.9), of which there are none,
- `ray.train.report` gets a process for its barrier (2.1), which none of our workers calls,
- a guard in one more process (1.8) frees the workers' resources should the controller die and its driver live on.
  Here the driver asks the actor to `stop`; only what an actor leaves that was killed is held until the driver ends,
- a watcher in one more process asks whether nodes are drained. The controller asks that itself, in `_Sizes`.

What Ray Train would wait for without an end, or for minutes, has a bound here: placement, start, joining, a silent
rank, leaving. Its own policies are replaced (`_Sizes`, `_Restarts`): its elastic one knows nothing of whole replicas of
a model and of resources that others use, ends a group in the middle of a step, and retries a start for ever.
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
"""Longest time for placed workers to start, and again for them to import torch and to join a group."""
_LEAVE_S = 5.0
"""Longest wait for ranks to leave the group; what a dead one holds is gone with its process."""
_SILENT_S = 30.0
"""A rank of which nothing was heard for so long is missing, if `timeout_s` is not even shorter."""
_SETTLE_S = 2.0
"""Time for what lost workers held to become free, and for the last of several ranks to say what it waited for."""
_PLACE_S = 10.0
"""Longest wait for room that was there a moment ago."""
_POLL_S = 0.25
_NODES_S = 1.0
"""Time between two looks at the cluster's nodes."""
_RELEASE = ResizeDecision(num_workers=0, resources_per_worker={})
"""Ends a group that has left before there is room for the next one: a node that is drained goes once its workers have."""
_running: list[TrainController] = []

log = get_logger(__name__)


def launch(job: Launch, actor: Any, ranks: RankRegistry) -> MaasError | None:
    """Runs all attempts of a run; returns what ended the last one, or None.

    Args:
        job: the run.
        actor: the actor in whose process this is called.
        ranks: what the ranks report to, through the actor.
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
    """Ends the workers of a launch that goes on, and frees what they hold."""
    for controller in _running:
        if (workers := controller.get_worker_group()) is not None:
            workers.abort()


class _Gpus(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _SharedGpus


class _SharedGpus(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True
    """Ranks of one machine see each other's GPUs, which NCCL needs for copies between them."""


class _Meeting(WorkerGroupCallback):  # type: ignore[misc]
    """Joins the workers to one process group of torch before they train, and enters them in the registry."""

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
        """The answer of each rank. Raises as soon as one fails, and names those that take longer than `_START_S`."""
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
        """Gives up the start unless it ends, or this is called again, within `_START_S`."""
        self._unwatch()
        self._too_slow = threading.Timer(_START_S, self._placed.shutdown)  # ends workers, and so who waits for one
        self._too_slow.daemon = True
        self._too_slow.start()

    def _unwatch(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        return dict(custom_runtime_env)  # without the variables that every process of the cluster was born with

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self.has_started():  # then Ray Train leaves the workers, whose resources nobody else could get
                self._worker_group_state.shutdown()
                self._clear_state()
            raise
        finally:
            self._unwatch()

    def _create_placement_group(self, scaling_config: ScalingConfig, context: Any) -> Any:
        # Ray reserves room worker by worker, and may put three on one node and the fourth on another. Room for workers
        # that have to be together is reserved in one piece, which is always on one node.
        room = {name: amount * self._together for name, amount in context.resources_per_worker.items()}
        bundles = [room] * (context.num_workers // self._together)
        self._placed = DefaultPlacementGroupHandle(placement_group(bundles, strategy=context.placement_strategy))
        return self._placed

    def _create_workers(self, num_workers: int, *context: Any, **options: Any) -> Any:
        self.watch()
        # Ranks follow nodes, so the workers of one piece get neighbouring ranks, as the mesh has it.
        pieces = [worker // self._together for worker in range(num_workers)]
        return super()._create_workers(num_workers, *context, **{**options, "placement_group_bundle_indices": pieces})

    def _init_train_context_on_workers(self, *context: Any) -> None:
        super()._init_train_context_on_workers(*context)
        self._unwatch()  # from here on `_Meeting` bounds what is waited for


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
        """How many workers of the group each node has, by its id; they may be dead already."""
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
            # Who goes on although others gave up waiting is the one that they waited for.
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
    """How many workers, and when to change that: at a committed step, or after a loss."""

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

    # What hands the request to the autoscaler is one actor of the cluster, bound to the node of the first driver that made
    # a request. Once that node is lost, each request waits 5 s in vain: here it may only delay other requests.

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
                f"run {self._job.run!r} found no room for {self._job.sizes[0]} workers of {dict(self._job.resources)}{each} "
                f"within workers.placement_timeout_s {self._job.placement_timeout_s:g} s; committed checkpoints are kept: give --resume when there "
                "is room"
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
        except ray.exceptions.RpcError as error:  # the head is away; ranks train on without it, and it is asked again
            log.warning("the cluster's head does not answer: %s", error)
        return NoopDecision()

    def after_claims(self, num_workers: int) -> int:
        """How many workers start now. Waits while serving claims room, and then without a limit for room of its own.

        Called when the old workers have ended and hold nothing any more.
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
        """Seconds since the run began to look for room."""
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        return now - self._waiting_since

    def _size(self) -> int:
        job = self._job
        return round_down(find_room(job.resources, self._held(), job.sizes[-1], job.together), job.sizes)

    def _reason(self, num_workers: int) -> str | None:
        """Why the workers should leave and start anew, if they should."""
        now = time.monotonic()
        if now - self._asked_nodes < _NODES_S:
            return None
        self._asked_nodes = now
        if going := draining_nodes() & self._held().keys():
            return f"node {min(going)[:12]} is about to be taken away"
        if who := claimed():
            return f"{who} claims room"
        if num_workers < self._job.sizes[-1] and now - self._looked >= self._job.scale_up_interval_s:
            self._looked = now
            if (size := self._size()) > num_workers:
                return f"there is room for {size} workers"
        return None


class _Restarts(FailurePolicy):  # type: ignore[misc]
    """Starts again after a loss, so often in a row; a checkpoint committed since the last one begins the count anew."""

    def __init__(self, job: Launch, ranks: RankRegistry) -> None:
        super().__init__(FailureConfig(max_failures=job.max_restarts))
        self._job = job
        self._ranks = ranks
        self._losses = 0
        self._committed = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY  # somebody else took the room; `_Sizes` ends that in time
        rank, found = find_cause(training_failed_error)
        self._ranks.end(f"{'' if rank is None else f'rank {rank}: '}{str(found).partition(chr(10))[0]}")
        if isinstance(training_failed_error, ControllerError) and not isinstance(
            cause, WorkerGroupStartupFailedError | ray.exceptions.RayActorError
        ):
            return FailureDecision.RAISE
        if isinstance(found, MaasError) and not found.retryable:
            return FailureDecision.RAISE  # it would come again
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
    """What each Ray Train worker runs. A closure, because Ray then sends only what it names, not this whole module."""

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
    """Where Ray Train keeps its own notes during an attempt: beside ours, since every node must reach them."""
    if store.root is not None:
        return pyarrow.fs.LocalFileSystem(), str(store.root / "ray")
    if storage.uri.startswith("s3://") and storage.endpoint:
        scheme, _, host = storage.endpoint.partition("://")
        host = host.rpartition("@")[
            2
        ]  # requests are signed; what stands before it would only be shown in the dashboard
        filesystem = pyarrow.fs.S3FileSystem(
            endpoint_override=host, scheme=scheme, region=storage.region or "us-east-1"
        )
        return filesystem, f"{storage.uri.removeprefix('s3://').rstrip('/')}/ray"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage.uri)
    return filesystem, f"{path.rstrip('/')}/ray"


def _forget(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)
