"""Validation beside training: a Ray task looks at a committed checkpoint while the ranks train on.

Ray Train has such a thing (`ray.train.report(..., validation=...)`, alpha), and it does not fit: it starts from a
checkpoint that all ranks report together, while ours are committed in the background by rank 0; it remembers what is
missing under the name of one launch, which a resumed run does not have; and its last wait has no end. So rank 0 owns one
task at a time, which writes its metrics into the run's log. What is missing there is done by whoever resumes. A task
that fails does not end the run: why it failed stands in the log instead, and so in `maas-ray runs` and in the report.

The metrics of a checkpoint enter the history when the next one is due, however early they came: so early stopping decides
the same in a run that was interrupted.
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
"""Longest wait for the metrics of a task that is done."""
MAX_REASON = 500
"""Characters of why a checkpoint has no metrics: Ray tells of a task that died on a page."""
POLL_S = 2.0
"""The ranks agree so often on whether to wait on: each collective operation stays short."""

log = get_logger(__name__)


class Beside:
    """The validation tasks of one rank, one at a time; `close` it.

    Args:
        store: of the run.
        spec: the run, with an absolute store.
    """

    def __init__(self, store: ObstoreStore, spec: TrainSpec) -> None:
        self._spec = spec
        self._runs = Runs(store)
        self._lock = threading.Lock()
        self._flight: tuple[int, Any, float] | None = None
        self._due: int | None = None
        self.metrics = self._runs.validated(spec.run)
        """What is known of each step: `validation_loss` and so on."""
        self._samples: dict[int, str] = {}

    def start(self, step: int) -> None:
        """Begins to validate a committed checkpoint, unless its metrics are known or another one is under way.

        Called from the thread that saves; never waits.
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
                scheduling_strategy="DEFAULT",  # not in the place that is reserved for the ranks
                name=f"validation of {self._spec.run}, step {step}",
            )
            self._flight = (step, task.remote(self._spec.model_dump_json(), step), time.monotonic())

    def resume(self, history: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> None:
        """Begins what a run that goes on still lacks: the newest of these checkpoints, if the history is without it."""
        known = {entry["step"] for entry in history if "validation" in entry}
        if steps and steps[-1] not in known:
            self.start(steps[-1])

    def is_ready(self, wait_s: float) -> bool:
        """Waits so long for the metrics that are due; true if they are there, or given up, or none are due."""
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
            self._give_up(step, f"it took longer than validation.timeout_s of {self._spec.validation.timeout_s:g} s")
            return True
        return False

    def take(self) -> tuple[int, dict[str, float], str] | None:
        """The step that was due, its metrics without `validation_`, and predictions (see loop/predictions.py) if they are shown.

        Each is given once. None: there is nothing.
        """
        with self._lock:
            step, self._due = self._due, None
        if step is None or step not in self.metrics:
            return None
        metrics = {name.removeprefix(VALIDATION): value for name, value in self.metrics[step].items()}
        return step, metrics, self._samples.pop(step, "")

    def close(self) -> None:
        """Ends a task that is under way; whoever resumes the run begins it again."""
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
        with suppress(MaasError):  # a store that fails now is met again, where something depends on it
            self._runs.record(self._spec.run, {"type": "unvalidated", "step": step, "error": reason})
        with self._lock:
            self._flight = None


def refuse_no_room(spec: TrainSpec) -> None:
    """Refuses a cluster that holds the ranks, but not the task beside them: its metrics would never come.

    Counts what the living nodes have in total; where an autoscaler may add nodes nothing is refused.

    Raises:
        ResourcesMissing: says what is missing.
    """
    wanted: Resources = {"CPU": spec.validation.cpus, "GPU": spec.validation.gpus}
    ranks: Resources = {"CPU": spec.workers.cpus, "GPU": spec.workers.gpus}
    least = spec.layouts()[0].world
    nodes = [] if has_autoscaler() else alive_nodes()
    for name in ("CPU", "GPU"):
        needed, there = least * ranks[name] + wanted[name], sum(node.get(name, 0.0) for node in nodes)
        if nodes and wanted[name] and there < needed:
            raise ResourcesMissing(
                f"validation.mode async: the cluster has {there:g} {name}, and {least} workers of {ranks[name]:g} and the "
                f"validation beside them of {wanted[name]:g} need {needed:g}; add nodes, take fewer workers, or validate "
                "between steps (validation.mode: sync)"
            )


def _validate(spec_json: str, step: int) -> tuple[dict[str, float], str]:
    """The task."""
    import torch  # late: the program that begins a run has no need of it, and it takes 2 s

    from maas_ray.train.validation.load_model import (  # late: they import torchmetrics
        evaluate_trained,
        load_trained,
        sample_trained,
    )

    spec = TrainSpec.model_validate_json(spec_json)
    torch.set_num_threads(spec.validation.cpus)
    store = open_store(spec.storage)
    device = torch.device("cuda" if spec.validation.gpus else "cpu")  # not run on a GPU
    trained = load_trained(store, spec.run, step)
    evaluation = evaluate_trained(trained, "validation", device)
    samples = sample_trained(trained, "validation", count, device) if (count := spec.tensorboard.samples) else ""
    metrics = {f"{VALIDATION}{name}": value for name, value in finite(evaluation.metrics).items()}
    Runs(store).record(spec.run, {"type": "validated", "step": step, "metrics": metrics})
    return metrics, samples
