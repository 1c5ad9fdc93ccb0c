"""Ray Train's controller and its parts, which `train/ranks/launch.py` derives from and leaves out.

Imports ray.train, and nothing of torch. All read in Ray 2.60.0. Why not `TorchTrainer.fit()`: see launch.py.
"""

from typing import Any

from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback  # left out
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback  # left out
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback  # left out
from ray.train.v2._internal.exceptions import (  # causes of a lost attempt, told apart
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback  # joins the workers to one process group
from ray.train.v2._internal.execution.controller import TrainController  # runs in the board's process
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import InitializingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy  # when to start again
from ray.train.v2._internal.execution.scaling_policy import (  # how many workers, and when to change that
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state  # bounded waits, workers placed together
from ray.train.v2._internal.execution.worker_group import worker_group as _groups
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # calls the controller in this process

__all__ = [
    "BackendSetupCallback",
    "DataParallelTrainer",
    "DatasetsCallback",
    "DefaultPlacementGroupHandle",
    "FailureDecision",
    "FailurePolicy",
    "InitializingState",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "PreemptionCallback",
    "ResizeDecision",
    "ScalingDecision",
    "ScalingPolicy",
    "TrainController",
    "TrainControllerLoopIterationResult",
    "WorkerGroup",
    "WorkerGroupCallback",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "propagated_callbacks",
    "start_no_barrier",
]


class _NoBarrier:
    """Stands where Ray Train starts a process for the barrier of `ray.train.report`, at which no rank of ours arrives."""

    @classmethod
    def options(cls, **_: Any) -> type["_NoBarrier"]:
        return cls

    @staticmethod
    def remote(**_: Any) -> str:
        return "no barrier"


def start_no_barrier() -> None:
    """Worker groups of this process start without the process for the barrier of `ray.train.report`, from now on."""
    _groups.SynchronizationActor = _NoBarrier
    state._shutdown_sync_actor = lambda barrier: None


def propagated_callbacks(controller: TrainController) -> list[Any]:
    """What a controller calls back for each of its worker groups; the list itself, to be changed in place."""
    found: list[Any] = controller.__dict__["_worker_group_callbacks_to_propagate"]
    return found
