"""Learning-rate range test: a short training with an exponentially rising rate shows where the loss falls and diverges.

Smith 2015, "Cyclical Learning Rates for Training Neural Networks" (https://arxiv.org/abs/1506.01186), section 3.3; the
exponential growth and the end at four times the best loss are from fastai's `lr_find`. It uses the steps of the
training loop with the model, data and batch of the spec, in this process, and writes nothing to the store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log10

import numpy as np
import torch

from maas_ray.data.stored.dataset import open_dataset
from maas_ray.errors import SpecError, TrainingFailed
from maas_ray.store.objects import open_store
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state, count_class_rows
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.optim.schedule import Schedule
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.ranks.initial_state import load_start
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.schedule import ScheduleSpec
from maas_ray.train.spec.train import TrainSpec

DIVERGED = 4.0
"""The test ends when the smoothed loss exceeds this multiple of the best one."""
MIN_STEPS = 10
MIN_FALL = 0.05
"""Share of the first loss by which the smoothed loss must fall for a proposal."""


@dataclass(frozen=True)
class Point:
    """One step of the test.

    Attributes:
        step: number of the step, from 1.
        lr: learning rate of the step.
        loss: mean loss of the batch, before the update.
        smoothed: exponential average of the losses so far.
    """

    step: int
    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class LrRange:
    """The steps of a test and the resulting proposal."""

    points: list[Point]
    diverged_at: float | None
    """Learning rate at which the loss diverged, or None."""
    steepest: float | None
    """Learning rate at which the smoothed loss falls fastest per decade; not always stable."""
    below_minimum: float | None
    """A tenth of the learning rate with the lowest smoothed loss: the safe rate, which is proposed."""
    remark: str
    """Interpretation of the steps, with a hint if there is no proposal."""


def find_learning_rates(
    spec: TrainSpec,
    data_digest: str,
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    on_point: Callable[[Point], None] | None = None,
) -> LrRange:
    """Trains with a learning rate that rises from `low` to `high`, until the loss diverges.

    It starts from the run's initial weights: those of `init`, else random ones from the seed.

    Args:
        spec: the run; its learning rate, schedule, workers and layout are not used.
        data_digest: the prepared data set in the spec's store.
        low: first learning rate.
        high: last learning rate.
        steps: number of optimizer steps, evenly spaced in the logarithm of the rate.
        smoothing: weight of the earlier steps in the smoothed loss, in [0, 1); the bias at the start is corrected.
        on_point: called after each step.

    Raises:
        SpecError: an argument is out of range, or the model is not trained in steps.
        MaasError: the model cannot be trained in one process.
    """
    _refuse_unfit(spec, low, high, steps, smoothing)
    optimizer = spec.optimizer.model_copy(update={"lr": low})
    changes = {"epochs": None, "steps": steps, "optimizer": optimizer, "schedule": ScheduleSpec()}
    spec = spec.model_copy(update=changes)
    store = open_store(spec.storage)
    dataset = open_dataset(store, data_digest)
    num_rows, coordinates = dataset.num_rows["train"], RankCoordinates(MeshLayout(), None)
    device = torch.device("cuda" if spec.workers.gpus and torch.cuda.is_available() else "cpu")
    state = build_train_state(
        spec, dataset.features, num_rows, coordinates, device, class_rows=count_class_rows(spec, dataset)
    )
    if spec.init is not None:
        load_start(store, spec.model_copy(update={"init": spec.init.absolute()}), state)
    growth = high / low
    state = replace(state, schedule=Schedule(state.optimizer, lambda step: growth ** (step / (steps - 1))))
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates, state.min_rows)
    state.train()
    points: list[Point] = []
    average, best, diverged_at = 0.0, float("inf"), None
    for step in range(steps):
        lr = state.schedule.lr
        share, _ = train_step(plan, state, loader, step)
        try:
            loss = mean_loss(state, share, step)
        except TrainingFailed:  # the loss is not finite
            diverged_at = lr
            break
        average = smoothing * average + (1 - smoothing) * loss
        points.append(Point(step + 1, lr, loss, average / (1 - smoothing ** (step + 1))))
        if on_point is not None:
            on_point(points[-1])
        best = min(best, points[-1].smoothed)
        if points[-1].smoothed > DIVERGED * best:
            diverged_at = lr
            break
    return conclude(points, diverged_at)


def conclude(points: Sequence[Point], diverged_at: float | None) -> LrRange:
    """Derives the proposal from the steps of a test.

    Args:
        points: the steps, with rising learning rates.
        diverged_at: learning rate at which the loss diverged.
    """
    found = list(points)
    smoothed = np.array([point.smoothed for point in found])
    lowest = int(smoothed.argmin()) if len(found) else 0
    if lowest < 2 or smoothed[lowest] > (1 - MIN_FALL) * smoothed[0]:
        why = (
            "it diverged first: start with a lower rate" if diverged_at else "raise the highest rate, or use more steps"
        )
        return LrRange(found, diverged_at, None, None, f"the loss did not fall at any of these rates; {why}")
    decades = np.log10([point.lr for point in found[: lowest + 1]])
    steepest = found[int(np.gradient(smoothed[: lowest + 1], decades).argmin())].lr
    remark = f"the loss is lowest at {found[lowest].lr:.2g}"
    if diverged_at is None and lowest == len(found) - 1:
        remark += ", the highest rate, and was still falling: raise the highest rate"
    elif diverged_at is None:
        remark += " and did not diverge at higher rates"
    else:
        remark += f" and diverges at {diverged_at:.2g}"
    return LrRange(found, diverged_at, _rounded(steepest), _rounded(found[lowest].lr / 10), remark)


def _rounded(value: float) -> float:
    """Rounds to two digits, the precision of the test."""
    return float(f"{value:.2g}")


def _refuse_unfit(spec: TrainSpec, low: float, high: float, steps: int, smoothing: float) -> None:
    if spec.model.is_classical:
        raise SpecError(f"{spec.model.name} is fitted by scikit-learn and has no learning rate")
    if not 0 < low < high < float("inf") or log10(high / low) < 1:
        raise SpecError(f"the rates must be positive and at least a factor of 10 apart, not {low} and {high}")
    if steps < MIN_STEPS:
        raise SpecError(f"steps must be at least {MIN_STEPS}, not {steps}")
    if not 0 <= smoothing < 1:
        raise SpecError(f"smoothing must be at least 0 and below 1, not {smoothing}")
