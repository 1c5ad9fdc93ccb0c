"""The training loop in plain torch: no Ray, no store, no files. Each rank calls `fit` once.

A run is reproducible despite interruptions, and the same training on every layout, because:
- the sample order is a function of (seed, position); the batch of step s starts at position s x global_size (after an
  extension, at the position of its first step plus the steps since then),
- dropout masks are functions of (seed, position of the sample); other random numbers of step s are seeded by
  (seed, s, r), where r is the data-parallel rank,
- gradients are summed over the ranks and divided by the number of samples (or valid tokens, or the sum of the weights of
  samples) of the GLOBAL batch,
- the order in which DistributedDataParallel sums gradients is fixed before the first step (`warm_up_buckets`).
So step s + 1 depends only on the state after step s.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from maas_ray.data.loading.rows import Batch
from maas_ray.errors import TrainingFailed
from maas_ray.models.weights import weights
from maas_ray.train.loop.auxiliary import AuxiliaryLosses, split_output
from maas_ray.train.loop.ema import Ema
from maas_ray.train.loop.gradients import add_penalty_gradient, align_gradients, clip_gradients, penalty
from maas_ray.train.loop.progress import Progress
from maas_ray.train.modules.batch_statistics import fewest_rows, frozen_statistics
from maas_ray.train.modules.dropout import samples
from maas_ray.train.modules.unused_parameters import UNEQUAL, unequal_use
from maas_ray.train.optim.schedule import Schedule
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.parallel.pipeline import MicroBatch, Pipeline
from maas_ray.train.spec.length import ExtensionSpec, position_of


class Batches(Protocol):
    """Loads this rank's share of each global batch: a `Loader`, or one that reads ahead."""

    def load(self, cursor: int, stop: int) -> list[Batch]:
        """The micro-batches of global positions [cursor, min(cursor + global size, stop))."""
        ...


LossFn = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, K], target [N]) -> loss of each sample [N]."""


@dataclass(frozen=True)
class LoopPlan:
    """The numbers of a run, the same on every rank.

    Attributes:
        total_steps: optimizer steps of the whole run.
        stop: global sample position at which the run ends.
        global_size: samples per step over all ranks; the last step may have fewer.
        num_rows: rows of the training split.
        log_every: steps between logged losses.
        checkpoint_every: steps between checkpoints; None: at the end of each epoch.
        validate_every: steps between validations; None: at the end of each epoch.
        extensions: extensions of the run, oldest first.
        saves_validated: whether validated states are committed too, since each may be the best.
    """

    total_steps: int
    stop: int
    global_size: int
    num_rows: int
    seed: int
    log_every: int
    checkpoint_every: int | None
    validate_every: int | None
    max_grad_norm: float | None
    precision: str
    extensions: Sequence[ExtensionSpec] = ()
    saves_validated: bool = False

    def ends_epoch(self, step: int) -> bool:
        """Whether the batch of step number `step` (from 0) takes the last sample of an epoch."""
        first, after = self.position(step), min(self.position(step) + self.global_size, self.stop)
        return first // self.num_rows != after // self.num_rows

    def is_checkpoint(self, step: int) -> bool:
        """Whether the state after step number `step` (from 0) must be committed."""
        return self._is_due(step, self.checkpoint_every)

    def is_validated(self, step: int) -> bool:
        """Whether step number `step` (from 0) is followed by a validation."""
        return self._is_due(step, self.validate_every)

    def epoch(self, done: int) -> float:
        """Passes over the training split after `done` steps."""
        return self.position(done) / self.num_rows

    def position(self, done: int) -> int:
        """Global sample position after `done` steps."""
        return min(position_of(done, self.global_size, self.extensions), self.stop)

    def _is_due(self, step: int, every: int | None) -> bool:
        if step + 1 == self.total_steps:
            return True
        return self.ends_epoch(step) if every is None else (step + 1) % every == 0


@dataclass(frozen=True)
class TrainState:
    """The training state of this rank.

    Attributes:
        parts: this rank's parts of the network: all of it, or its pipeline stages; possibly with DTensors.
        model: preprocessed rows -> logits [N, K], the part wrapped for data parallelism; unused with a pipeline.
        preprocess: encoded raw columns -> preprocessed rows.
        num_valid: (target) -> number of its losses; None: one for each row.
        row_weights: the weights of rows in the loss, whose sum then replaces the number of losses; None: no weights.
        l1: factor of the sum of absolute weights, added to the mean loss.
        l2: factor of the sum of squared weights.
        ema: the moving average of the weights, if any.
        pipeline: the schedule of the stages, if any.
        auxiliary: the auxiliary losses of the network, if any.
        dtype: type of floating-point rows of the network.
    """

    parts: Sequence[nn.Module]
    model: nn.Module
    preprocess: Callable[..., Tensor]
    loss: LossFn
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    device: torch.device
    coordinates: RankCoordinates
    num_valid: Callable[[Tensor], Tensor] | None = None
    row_weights: Callable[[Batch], Tensor] | None = None
    l1: float = 0.0
    l2: float = 0.0
    ema: Ema | None = None
    pipeline: Pipeline | None = None
    auxiliary: AuxiliaryLosses | None = None
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trained weights of this rank that are penalized."""
        return [weight for part in self.parts for weight in weights(part) if weight.requires_grad]

    @property
    def min_rows(self) -> int:
        """The smallest number of rows of a micro-batch that is not empty."""
        return fewest_rows(self.parts)

    def train(self, mode: bool = True) -> None:
        """Switches all parts to training mode, or to evaluation mode."""
        for part in self.parts:
            part.train(mode)

    def microbatch_rows(self, plan: "LoopPlan", num_microbatches: int) -> int:
        """Rows of each micro-batch of a full step."""
        share = -(-plan.global_size // self.coordinates.layout.dp)
        return -(-share // num_microbatches)

    def rows(self, batch: Batch) -> Tensor:
        """The input of the network for a batch."""
        columns = [column.to(self.device, non_blocking=True) for column in batch.columns]
        rows = self.preprocess(*columns)
        return rows.to(self.dtype) if rows.is_floating_point() else rows


class LoopHooks:
    """What the loop calls, on every rank after the same steps; override what a run needs."""

    validates = False
    """Whether there is anything to validate with."""

    def begin_step(self, step: int) -> None:
        """Before each step; steps count from 1."""

    def report(self, progress: Progress) -> None:
        """After each logged step."""

    def validate(self, done: int) -> None:
        """In evaluation mode, with the number of steps done, at the steps of the plan and after the last step."""

    def should_stop(self, is_validated: bool) -> bool:
        """After each logged step, after each validation (true), and before the first step of a run that continues.

        Every rank returns the same. The state after the step at which it is true is the last.
        """
        return False

    def should_leave(self, done: int) -> bool:
        """After each step but the last. Where it is true, the state is committed, and the run continues elsewhere."""
        return False

    def save(self, done: int) -> None:
        """When the state is to be committed, with the number of steps done."""


def fit(plan: LoopPlan, state: TrainState, loader: Batches, first_step: int, hooks: LoopHooks) -> bool:
    """Trains from `first_step` to the end, until a hook stops it, or to where one interrupts it.

    Args:
        plan: the numbers of the run.
        state: model, loss and optimizer of this rank, with the state after `first_step` steps.
        loader: this rank's share of each global batch.
        first_step: steps that are done already.
        hooks: called on every rank.

    Returns:
        Whether the run is done; False if it was interrupted.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    if first_step and hooks.should_stop(True):
        return True  # it was decided before the last commit
    state.train()
    logged_at, logged_s = first_step, time.perf_counter()
    for step in range(first_step, plan.total_steps):
        hooks.begin_step(step + 1)
        lr = state.schedule.lr
        loss, _ = train_step(plan, state, loader, step)
        done = step + 1
        is_logged = done % plan.log_every == 0 or done == plan.total_steps
        is_validated = hooks.validates and plan.is_validated(step)
        if is_logged:
            mean = mean_loss(state, loss, step)
            rate = (done - logged_at) * plan.global_size / (time.perf_counter() - logged_s)
            auxiliary = state.auxiliary.means(state.coordinates.layout.tp) if state.auxiliary is not None else {}
            hooks.report(Progress(done, plan.total_steps, plan.epoch(done), mean, lr, rate, auxiliary=auxiliary))
            logged_at, logged_s = done, time.perf_counter()
        if is_validated:
            _validate(state, hooks, done)
        is_last = (is_logged or is_validated) and hooks.should_stop(is_validated)
        if hooks.validates and is_last and not is_validated:
            _validate(state, hooks, done)
        is_interrupted = not is_last and done < plan.total_steps and hooks.should_leave(done)
        if plan.is_checkpoint(step) or (is_validated and plan.saves_validated) or is_last or is_interrupted:
            hooks.save(done)
        if is_last:
            return True
        if is_interrupted:
            return False
    return True


def _validate(state: TrainState, hooks: LoopHooks, done: int) -> None:
    state.train(False)
    hooks.validate(done)
    state.train()


def train_step(plan: LoopPlan, state: TrainState, loader: Batches, step: int) -> tuple[Tensor, float | None]:
    """Runs one optimizer step.

    Returns:
        This rank's share of the global mean loss, whose sum over the data-parallel ranks is the mean; and the norm of
        the whole gradient, if clipped.
    """
    coordinates = state.coordinates
    seed_step(plan.seed, step, coordinates.dp)
    cursor = plan.position(step)
    batches = loader.load(cursor, plan.stop)
    num_rows = min(plan.global_size, plan.stop - cursor)
    count = _start_counting(state, batches, num_rows)
    if state.auxiliary is not None:
        state.auxiliary.begin(num_rows)
    state.optimizer.zero_grad(set_to_none=True)
    # Replicas and shards average their gradients; the mean over the global batch needs the factor dp / count.
    if state.pipeline is not None:
        filled = _filled(plan, state, batches)
        total = state.pipeline.step(filled, coordinates.layout.dp / count())
    else:
        total = torch.zeros((), dtype=torch.float64, device=state.device)
        scale: float | None = None
        for batch, is_last in _with_last(batches):
            with _sync(state.model, is_last):
                loss, auxiliary = _losses(plan, state, batch)
                scale = scale or coordinates.layout.dp / count()  # the first forward pass overlaps the wait
                loss = loss * scale
                if auxiliary is not None:
                    loss = loss + auxiliary * coordinates.layout.dp
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    # From the optimizer's lists: a traversal of all modules takes as long as a small layer.
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    align_gradients(parameters)
    if state.l1 or state.l2:
        add_penalty_gradient(state.weights, state.l1, state.l2)
    norm = None
    if plan.max_grad_norm is not None:
        norm = clip_gradients(parameters, plan.max_grad_norm, coordinates.layout)
    state.optimizer.step()
    state.schedule.step()
    if state.ema is not None:
        state.ema.update(step + 1)
    return total / coordinates.layout.dp, norm


def _start_counting(state: TrainState, batches: Sequence[Batch], num_rows: int) -> Callable[[], float]:
    """Starts counting the divisor of the global batch's sum of losses; returns a function that waits for it."""
    if state.num_valid is None and state.row_weights is None:
        return lambda: num_rows
    count = torch.zeros((), dtype=torch.float64, device=state.device)
    for batch in batches:
        if state.row_weights is not None:
            count += state.row_weights(batch).sum()
        elif state.num_valid is not None:
            count += state.num_valid(batch.target).to(state.device)
    layout = state.coordinates.layout
    work = dist.all_reduce(count, async_op=True) if dist.is_initialized() else None

    def counted() -> float:
        if work is not None:
            work.wait()
        # The ranks of a pipeline and of a tensor-parallel group have counted the same rows.
        return float(count) / (layout.pp * layout.tp) or 1.0

    return counted


def _filled(plan: LoopPlan, state: TrainState, batches: Sequence[Batch]) -> list[MicroBatch]:
    """Pads micro-batches to one size, which a pipeline needs; padding does not count."""
    size = state.microbatch_rows(plan, len(batches))
    filled: list[MicroBatch] = []
    for batch in batches:
        rows, target, missing = state.rows(batch), batch.target.to(state.device), size - batch.num_rows
        positions = batch.positions
        if missing:
            rows, target, positions = (_filled_up(values, missing) for values in (rows, target, positions))
        weights = state.row_weights(batch) if state.row_weights is not None else None
        filled.append(MicroBatch(rows, target, positions, batch.num_rows, weights))
    return filled


def warm_up_buckets(plan: LoopPlan, state: TrainState, loader: Batches) -> None:
    """Runs a forward and backward pass of one batch and discards it, before the state is loaded.

    DistributedDataParallel rebuilds its gradient buckets after its first backward pass. With three or more ranks the
    buckets determine the order of additions, so that a resumed run, whose first pass is later, would differ in the
    last bits from an uninterrupted one. After this call every step uses the final buckets.
    """
    if not isinstance(state.model, DistributedDataParallel):
        return
    net = state.parts[0]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    for _ in range(2):  # the second forward pass rebuilds the buckets
        for batch, is_last in _with_last(loader.load(0, plan.stop)):
            with _sync(state.model, is_last):
                loss, auxiliary = _losses(plan, state, batch)
                (loss if auxiliary is None else loss + auxiliary).backward()  # type: ignore[no-untyped-call]
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch (all devices in use), NumPy and Python for one step of one rank."""
    digest = sha256(f"{seed}/{step}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:8], "little")
    # The effect of torch.manual_seed on existing generators. torch.manual_seed would also record a call and its stack
    # for each kind of uninitialized device, every time: 0.7 ms per step, and a list that grows during the whole run.
    torch.default_generator.manual_seed(value)
    for kind in (torch.cuda, torch.xpu):
        if kind.is_initialized():
            kind.manual_seed_all(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def _losses(plan: LoopPlan, state: TrainState, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The sum of the losses of a micro-batch, and its share of the auxiliary losses, if any."""
    rows, positions = state.rows(batch), batch.positions
    if not batch.num_rows:  # this rank uses a padding row: few models support an empty batch
        rows, positions = _filled_up(rows, 1), _filled_up(positions, 1)
    is_sharded = isinstance(state.model, FSDPModule)  # its own policy determines the precision
    with (
        nullcontext() if batch.num_rows else frozen_statistics(state.parts),
        samples(plan.seed, positions),
        torch.autocast(state.device.type, torch.bfloat16, enabled=plan.precision == "bf16" and not is_sharded),
    ):
        try:
            output = state.model(rows)
        except RuntimeError as error:
            if UNEQUAL in str(error):
                raise unequal_use(error) from error
            raise
    if state.auxiliary is not None:
        logits, auxiliary = state.auxiliary.split(output, batch.num_rows)
    else:
        (logits, _), auxiliary = split_output(output, {}), None
    if not batch.num_rows:
        nothing: Tensor = logits.sum() * 0.0
        return nothing, auxiliary
    losses = state.loss(logits, batch.target.to(state.device, non_blocking=True))
    if state.row_weights is not None:
        losses = losses * state.row_weights(batch).to(losses.dtype)
    return losses.sum(), auxiliary


def _filled_up(rows: Tensor, missing: int) -> Tensor:
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))


def mean_loss(state: TrainState, share: Tensor, step: int) -> float:
    """The global mean loss of step number `step`, including penalties, from the shares of all ranks. Collective.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    layout, total = state.coordinates.layout, share.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    # The ranks of a tensor-parallel group have the same shares; in a pipeline only the last stage has one.
    mean = float(total) / layout.tp + penalty(state.weights, state.l1, state.l2, layout)
    if not np.isfinite(mean):
        raise TrainingFailed(
            f"the loss of step {step + 1} is {mean}; lower optimizer.lr, set max_grad_norm, or check the data for "
            "outliers"
        )
    return mean


def _sync(model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Exchanges gradients once per step, with the last micro-batch."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    return nullcontext()


def _with_last(batches: list[Batch]) -> Iterator[tuple[Batch, bool]]:
    for number, batch in enumerate(batches, start=1):
        yield batch, number == len(batches)
