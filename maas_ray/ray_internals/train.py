"""Ray Train's controller and its parts, which `train/ranks/ray_train` derives from or removes.

Imports ray.train, but not torch. Read in Ray 2.60.0. launch.py explains why `TorchTrainer.fit()` is not used.
"""

from typing import Any

from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback  # removed
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback  # removed
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback  # removed
from ray.train.v2._internal.exceptions import (  # causes of a failed attempt
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback  # creates the process group of the workers
from ray.train.v2._internal.execution.controller import TrainController  # runs in the process of the run's actor
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import InitializingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy  # restarts after failures
from ray.train.v2._internal.execution.scaling_policy import (  # number of workers, and its changes
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroup,
    state,
)  # timeouts, placement of workers on one node
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
    """Replaces the actor for the barrier of `ray.train.report`, which our ranks do not call."""

    @classmethod
    def options(cls, **_: Any) -> type["_NoBarrier"]:
        return cls

    @staticmethod
    def remote(**_: Any) -> str:
        return "no barrier"


def start_no_barrier() -> None:
    """Makes worker groups of this process start without the actor for the barrier of `ray.train.report`."""
    _groups.SynchronizationActor = _NoBarrier
    state._shutdown_sync_actor = lambda barrier: None


def propagated_callbacks(controller: TrainController) -> list[Any]:
    """The callbacks that a controller passes to its worker groups; the list itself, to be modified in place."""
    found: list[Any] = controller.__dict__["_worker_group_callbacks_to_propagate"]
    return found
