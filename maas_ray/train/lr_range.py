"""Learning-rate range test: a short training whose rate grows exponentially shows where the loss falls and where it breaks.

Smith 2015, "Cyclical Learning Rates for Training Neural Networks" (https://arxiv.org/abs/1506.01186), section 3.3; the
exponential growth and the end at four times the best loss are those of fastai's `lr_find`. It runs the training loop's own
steps on the spec's own model, data and batch, in this process alone, and leaves nothing in the store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log10

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from maas_ray.data.stored.dataset import open_dataset
from maas_ray.errors import SpecError, TrainingFailed
from maas_ray.store.objects import open_store
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.fit import mean_loss, train_step
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.ranks.worker import load_start
from maas_ray.train.spec.optim import ScheduleSpec
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec

DIVERGED = 4.0
"""A smoothed loss of so many times the best one ends the test."""
MIN_STEPS = 10
MIN_FALL = 0.05
"""Part of the first loss by which the smoothed one has to fall, or nothing was learned that a rate could be read from."""


@dataclass(frozen=True)
class Point:
    """One step of the test.

    Attributes:
        step: from 1.
        lr: the rate of this step.
        loss: mean loss of its batch, before its update.
        smoothed: mean of the losses so far, the newer ones weighted more.
    """

    step: int
    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class LrRange:
    """The course of a test and what it suggests."""

    points: list[Point]
    diverged_at: float | None
    """The rate at which the loss broke; None: it did not, up to the highest."""
    steepest: float | None
    """The rate at which the smoothed loss falls fastest per decade: fast, and not always stable."""
    below_minimum: float | None
    """A tenth of the rate at which the smoothed loss is lowest: the safe one, which is proposed."""
    remark: str
    """What the course says, and what to do if it says nothing."""


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
    """Trains with a rate that grows from `low` to `high`, until it is there or the loss diverges.

    It begins with the weights with which the run would: those that the seed draws, or those that `init` names.

    Args:
        spec: the run; its learning rate, schedule, workers and layout are not used.
        data_digest: the prepared data set in the spec's store.
        low: first rate.
        high: last rate.
        steps: optimizer steps, evenly spaced in the rate's logarithm.
        smoothing: weight of the past in the smoothed loss, in [0, 1); it starts without a bias.
        on_point: called after each step.

    Raises:
        SpecError: a number is out of its range, or the model is not trained by steps.
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
    state = build_train_state(spec, dataset.features, num_rows, coordinates, device)
    if spec.init is not None:
        load_start(store, spec.model_copy(update={"init": spec.init.absolute()}), state)
    growth = high / low
    state = replace(state, schedule=LambdaLR(state.optimizer, lambda step: growth ** (step / (steps - 1))))
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    state.train()
    points: list[Point] = []
    average, best, diverged_at = 0.0, float("inf"), None
    for step in range(steps):
        lr = float(state.optimizer.param_groups[0]["lr"])
        share, _ = train_step(plan, state, loader, step)
        try:
            loss = mean_loss(state, share, step)
        except TrainingFailed:  # it is no number any more
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
    """What a course suggests.

    Args:
        points: the steps, with growing rates.
        diverged_at: the rate at which the loss broke.
    """
    found = list(points)
    smoothed = np.array([point.smoothed for point in found])
    lowest = int(smoothed.argmin()) if len(found) else 0
    if lowest < 2 or smoothed[lowest] > (1 - MIN_FALL) * smoothed[0]:
        why = (
            "it diverged before: begin with a lower rate"
            if diverged_at
            else "raise the highest rate, or take more steps"
        )
        return LrRange(found, diverged_at, None, None, f"the loss did not fall at any of these rates; {why}")
    decades = np.log10([point.lr for point in found[: lowest + 1]])
    steepest = found[int(np.gradient(smoothed[: lowest + 1], decades).argmin())].lr
    remark = f"the loss is lowest at {found[lowest].lr:.2g}"
    if diverged_at is None and lowest == len(found) - 1:
        remark += ", the highest rate, and was still falling: raise it to see where it ends"
    elif diverged_at is None:
        remark += " and did not diverge above"
    else:
        remark += f" and diverges at {diverged_at:.2g}"
    return LrRange(found, diverged_at, _rounded(steepest), _rounded(found[lowest].lr / 10), remark)


def _rounded(value: float) -> float:
    """Two digits: the test knows no more."""
    return float(f"{value:.2g}")


def _refuse_unfit(spec: TrainSpec, low: float, high: float, steps: int, smoothing: float) -> None:
    if spec.model.is_classical:
        raise SpecError(f"{spec.model.name} is fitted by scikit-learn and has no learning rate to test this way")
    if not 0 < low < high < float("inf") or log10(high / low) < 1:
        raise SpecError(f"the rates go from {low} to {high}; they have to be positive and at least a decade apart")
    if steps < MIN_STEPS:
        raise SpecError(f"{steps} steps are too few to see where the loss falls; take at least {MIN_STEPS}")
    if not 0 <= smoothing < 1:
        raise SpecError(f"smoothing is {smoothing}; it has to be at least 0 and below 1")
