"""Asynchronous validation: a Ray task evaluates a committed checkpoint while the ranks continue to train.

Ray Train's own (`ray.train.report(..., validation=...)`, alpha) is unsuitable: it starts from a checkpoint that all
ranks report together, while rank 0 commits ours in the background; it stores pending validations under the name of one
launch, which a resumed run does not have; and its last wait has no timeout. Therefore rank 0 owns one task at a time,
which writes its metrics to the run's log. A resumed run makes up for missing ones. A failed task does not end the run:
the log contains the reason, and so do `maas-ray runs` and the report.

The metrics of a checkpoint enter the history when the next one is due, even if they arrived earlier: early stopping
then decides the same in an interrupted run.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray

from maas_ray.cluster.capacity.preflight import Resources, alive_nodes, has_autoscaler
from maas_ray.display import get_logger
from maas_ray.errors import MaasError, ResourcesMissing
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.records.runs import Runs
from maas_ray.train.spec.metrics import VALIDATION, finite
from maas_ray.train.spec.train import TrainSpec

TIMEOUT_S = 60.0
"""Timeout for the metrics of a finished task."""
MAX_REASON = 500
"""Largest length of a reason in characters: Ray's message about a dead task fills a page."""
POLL_S = 2.0
"""Interval at which the waiting ranks agree to wait further, so that each collective operation is short."""

log = get_logger(__name__)


class AsyncValidator:
    """The validation tasks of one rank, one at a time; `close` it.

    Args:
        store: the store of the run.
        spec: the run, with an absolute store.
    """

    def __init__(self, store: ObstoreStore, spec: TrainSpec) -> None:
        self._spec = spec
        self._runs = Runs(store)
        self._lock = threading.Lock()
        self._flight: tuple[int, Any, float] | None = None
        self._due: int | None = None
        self.metrics = self._runs.validated(spec.run)
        """Known metrics of each step: `validation_loss` and so on."""
        self._samples: dict[int, str] = {}

    def start(self, step: int) -> None:
        """Starts the validation of a committed checkpoint, unless its metrics are known or another task is running.

        Called from the saving thread; never waits.
        """
        with self._lock:
            if self._flight is not None:
                return
            self._due = step
            if step in self.metrics:
                return
            wanted = self._spec.validation
            task = ray.remote(_validate).options(
                num_cpus=wanted.cpus,
                num_gpus=wanted.gpus,
                max_retries=1,
                scheduling_strategy="DEFAULT",  # outside of the placement group of the ranks
                name=f"validation of {self._spec.run}, step {step}",
            )
            self._flight = (step, task.remote(self._spec.model_dump_json(), step), time.monotonic())

    def resume(self, history: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> None:
        """Starts the validation of the newest of these checkpoints in a resumed run, if the history lacks it."""
        known = {entry["step"] for entry in history if "validation" in entry}
        if steps and steps[-1] not in known:
            self.start(steps[-1])

    def is_ready(self, wait_s: float) -> bool:
        """Waits up to `wait_s` for the due metrics; returns whether they have arrived or failed, or none are due."""
        with self._lock:
            flight = self._flight
        if flight is None:
            return True
        step, task, started_s = flight
        if ray.wait([task], timeout=wait_s)[0]:
            self._finish(step, task)
            return True
        if time.monotonic() - started_s > self._spec.validation.timeout_s:
            ray.cancel(task, force=True)
            self._give_up(step, f"it exceeded validation.timeout_s of {self._spec.validation.timeout_s:g} s")
            return True
        return False

    def take(self) -> tuple[int, dict[str, float], str] | None:
        """The due step, its metrics without `validation_`, and logged predictions (see evaluation/predictions.py), if any.

        Returns each step once; None if no step is due.
        """
        with self._lock:
            step, self._due = self._due, None
        if step is None or step not in self.metrics:
            return None
        metrics = {name.removeprefix(VALIDATION): value for name, value in self.metrics[step].items()}
        return step, metrics, self._samples.pop(step, "")

    def close(self) -> None:
        """Cancels a running task; a resumed run starts it again."""
        with self._lock:
            flight, self._flight = self._flight, None
        if flight is not None:
            ray.cancel(flight[1], force=True)

    def _finish(self, step: int, task: Any) -> None:
        try:
            self.metrics[step], self._samples[step] = ray.get(task, timeout=TIMEOUT_S)
        except ray.exceptions.RayError as error:
            self._give_up(step, str(getattr(error, "cause", None) or error))
            return
        with self._lock:
            self._flight = None

    def _give_up(self, step: int, reason: str) -> None:
        reason = " ".join(reason.split())[:MAX_REASON]
        log.warning("step %d has no validation metrics: %s", step, reason)
        with suppress(MaasError):  # an error of the store will recur where it matters
            self._runs.record(self._spec.run, {"type": "unvalidated", "step": step, "error": reason})
        with self._lock:
            self._flight = None


def check_validation_resources(spec: TrainSpec) -> None:
    """Refuses a cluster that fits the ranks without the validation task, whose metrics would never arrive.

    Counts the total resources of the living nodes; refuses nothing if an autoscaler may add nodes.

    Raises:
        ResourcesMissing: the message names the missing resources.
    """
    wanted: Resources = {"CPU": spec.validation.cpus, "GPU": spec.validation.gpus}
    ranks: Resources = {"CPU": spec.workers.cpus, "GPU": spec.workers.gpus}
    least = spec.layouts()[0].world
    nodes = [] if has_autoscaler() else alive_nodes()
    for name in ("CPU", "GPU"):
        needed, there = least * ranks[name] + wanted[name], sum(node.get(name, 0.0) for node in nodes)
        if nodes and wanted[name] and there < needed:
            raise ResourcesMissing(
                f"validation.mode async: the cluster has {there:g} {name}, but {least} workers of {ranks[name]:g} and "
                f"the validation task of {wanted[name]:g} need {needed:g}; add nodes, use fewer workers, or set "
                "validation.mode: sync"
            )


def _validate(spec_json: str, step: int) -> tuple[dict[str, float], str]:
    """The function of the Ray task."""
    import torch  # late: the program that starts a run does not need it, and its import takes 2 s

    from maas_ray.train.validation.load_model import (  # late: imports torchmetrics
        evaluate_trained,
        load_trained,
        sample_trained,
    )

    spec = TrainSpec.model_validate_json(spec_json)
    torch.set_num_threads(spec.validation.cpus)
    store = open_store(spec.storage)
    device = torch.device("cuda" if spec.validation.gpus else "cpu")  # not run on a GPU
    trained = load_trained(store, spec.run, step)
    evaluation = evaluate_trained(trained, "validation", device, spec.metrics)
    samples = sample_trained(trained, "validation", count, device) if (count := spec.tensorboard.samples) else ""
    metrics = {f"{VALIDATION}{name}": value for name, value in finite(evaluation.metrics).items()}
    Runs(store).record(spec.run, {"type": "validated", "step": step, "metrics": metrics, "classes": evaluation.classes})
    return metrics, samples
