"""Validation of a rank: evaluates held-out rows together with the other ranks, or waits for the results of a task."""

from collections.abc import Callable
from contextlib import nullcontext

from torch import nn

from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.data.loading.open import open_rows
from maas_ray.data.stored.dataset import Dataset
from maas_ray.train.evaluation.scorer import Scorer
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.progress import Progress
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.parallel.collectives import data_parallel_group, decided_by_rank0
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.async_validation import POLL_S, AsyncValidator

Validate = Callable[[int], None]
"""Called on every rank with the number of completed steps."""
Report = Callable[[Progress], None]


def sync_validation(
    spec: TrainSpec, plan: LoopPlan, dataset: Dataset, state: TrainState, report: Report
) -> Validate | None:
    """Returns a validation in which each rank evaluates its share of the rows; None without a validation split.

    Args:
        spec: the run.
        plan: step numbers of the run.
        dataset: data of the run.
        state: state of this rank; its average is evaluated if it exists.
        report: called with the metrics, on every rank.
    """
    if not dataset.num_rows.get("validation"):
        return None
    coordinates = state.coordinates
    rows = open_rows(dataset, "validation", seed=spec.seed)
    model = Scorer(state, plan, spec.batch.accumulation_steps)
    group = data_parallel_group(coordinates, spec.workers.timeout_s) if spec.metrics else None
    loss = build_loss(spec.objective, dataset.features.task)  # metrics have no weights
    if isinstance(loss, nn.Module):
        loss.to(state.device)

    def validate(done: int) -> None:
        from maas_ray.train.custom.metrics import build_metrics
        from maas_ray.train.evaluation.evaluate import (
            count_classes,  # late: the import of torchmetrics would delay the first step by 3 s
            evaluate_rows,
            report_classes,
        )
        from maas_ray.train.evaluation.predictions import show_samples

        samples = ""
        with state.average.applied() if state.average is not None else nullcontext():
            metrics = evaluate_rows(
                model,
                rows,
                task=dataset.features.task,
                num_classes=dataset.features.num_outputs,
                loss=loss,
                device=state.device,
                rank=coordinates.dp,
                world=coordinates.layout.dp,
                custom=build_metrics(spec.metrics, group),
                counts=(counts := count_classes(dataset.features)),
                scaling=dataset.features.target_scaling,
            )
            classes = report_classes(dataset.features, counts, len(rows))
            if count := spec.tensorboard.samples:
                samples = show_samples(model, rows, dataset, count, state.device)
        report(Progress(done, plan.total_steps, plan.epoch(done), metrics=metrics, samples=samples, classes=classes))

    return validate


def async_validation(
    validator: AsyncValidator | None, plan: LoopPlan, checkpointer: AsyncCheckpointer, state: TrainState, report: Report
) -> Validate:
    """Returns a validation in which all ranks wait, with a timeout, for the metrics of the previous checkpoint.

    Args:
        validator: the tasks of rank 0; None on other ranks.
        plan: step numbers of the run.
        checkpointer: the checkpointer, whose commits start the tasks.
        state: state of this rank.
        report: called with the metrics, on rank 0.
    """

    def validate(done: int) -> None:
        checkpointer.wait()  # a task starts only after its commit
        while not decided_by_rank0(validator is None or validator.is_ready(POLL_S), state.device):
            pass
        if validator is not None and (taken := validator.take()) is not None:
            step, metrics, samples = taken
            report(Progress(done, plan.total_steps, plan.epoch(done), metrics=metrics, samples=samples, of_step=step))

    return validate
