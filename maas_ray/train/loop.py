"""The training loop, in torch alone: no Ray, no store, no files. One rank runs one call of `fit`.

What makes a run exact, whatever interrupts it:
- sample order is a function of (seed, position); the batch of step s starts at position s x global_size,
- random numbers (dropout) of step s on rank r start from a seed made of (seed, s, r),
- gradients are summed over the ranks and divided by the number of samples of the GLOBAL batch,
- the order in which DistributedDataParallel adds up gradients is settled before the first step (`settle`).
So step s + 1 depends on nothing but the state after step s.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maas_ray.data.loader import Batch, Loader
from maas_ray.errors import TrainingFailed
from maas_ray.train.progress import Progress

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(scores [N, K], target [N]) -> loss of each sample [N]."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, the same on every rank.

    Attributes:
        total_steps: optimizer steps of the whole run.
        stop: global sample position at which the run ends.
        global_size: samples per step over all ranks; the last step may have fewer.
        num_rows: rows of the training split.
        log_every: steps between logged losses.
        checkpoint_every: steps between checkpoints; None: at the end of each epoch.
    """

    total_steps: int
    stop: int
    global_size: int
    num_rows: int
    seed: int
    log_every: int
    checkpoint_every: int | None
    clip_norm: float | None
    precision: str

    def ends_epoch(self, step: int) -> bool:
        """Whether the batch of step number `step` (from 0) takes the last sample of an epoch."""
        first, after = step * self.global_size, min((step + 1) * self.global_size, self.stop)
        return first // self.num_rows != after // self.num_rows

    def is_checkpoint(self, step: int) -> bool:
        """Whether the state after step number `step` (from 0) is to be committed."""
        if step + 1 == self.total_steps:
            return True
        return self.ends_epoch(step) if self.checkpoint_every is None else (step + 1) % self.checkpoint_every == 0


@dataclass(frozen=True)
class Trainee:
    """What is trained, on this rank.

    Attributes:
        net: the module whose weights are the result.
        model: raw (encoded) columns -> scores [N, K]: preprocessing and `net`, wrapped for several ranks.
        penalty: regularization added to the mean loss.
    """

    net: nn.Module
    model: nn.Module
    loss: LossFn
    penalty: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    device: torch.device


def fit(
    plan: Plan,
    trainee: Trainee,
    loader: Loader,
    first_step: int,
    *,
    report: Callable[[Progress], None],
    checkpoint: Callable[[int], None],
    validate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Trains from `first_step` to the end.

    Args:
        plan: the numbers of the run.
        trainee: model, loss and optimizer of this rank, holding the state after `first_step` steps.
        loader: this rank's share of each global batch.
        first_step: steps that are done already.
        report: called on every rank at each logged step and at each epoch's end.
        checkpoint: called on every rank with the number of steps done, when the state is to be committed.
        validate: called on every rank at each epoch's end.

    Raises:
        TrainingFailed: the loss is no longer a finite number.
    """
    trainee.model.train()
    logged_at, logged_s = first_step, time.perf_counter()
    for step in range(first_step, plan.total_steps):
        lr = float(trainee.optimizer.param_groups[0]["lr"])
        loss = train_step(plan, trainee, loader, step)
        done = step + 1
        if done % plan.log_every == 0 or done == plan.total_steps:
            mean = _mean_loss(plan, trainee, loss, step)
            rate = (done - logged_at) * plan.global_size / (time.perf_counter() - logged_s)
            report(Progress(done, plan.total_steps, _epoch(plan, done), mean, lr, rate))
            logged_at, logged_s = done, time.perf_counter()
        if validate is not None and plan.ends_epoch(step):
            trainee.model.eval()
            metrics = validate()
            trainee.model.train()
            report(Progress(done, plan.total_steps, _epoch(plan, done), metrics=metrics))
        if plan.is_checkpoint(step):
            checkpoint(done)


def train_step(plan: Plan, trainee: Trainee, loader: Loader, step: int) -> Tensor:
    """One optimizer step; returns this rank's share of the global mean loss (summed over ranks it is the mean)."""
    rank, world = rank_and_world()
    seed_step(plan.seed, step, rank)
    cursor = step * plan.global_size
    count = min(plan.global_size, plan.stop - cursor)
    trainee.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=trainee.device)
    for batch, is_last in _with_last(loader.load(cursor, plan.stop)):
        with _no_sync(trainee.model, unless=is_last):
            share = _loss_sum(plan, trainee, batch) / count
            # DistributedDataParallel averages over the ranks; a mean over the global batch is a sum of shares.
            scaled = share * world
            if is_last:
                scaled = scaled + trainee.penalty()  # the same on every rank, so averaging leaves it
            scaled.backward()  # type: ignore[no-untyped-call]
        total += share.detach()
    if plan.clip_norm is not None:
        nn.utils.clip_grad_norm_(trainee.net.parameters(), plan.clip_norm)
    trainee.optimizer.step()
    trainee.schedule.step()
    return total


def settle(plan: Plan, trainee: Trainee, loader: Loader) -> None:
    """Runs one batch forward and back and forgets it, before the state is loaded.

    DistributedDataParallel re-groups its gradient buckets after its first backward pass. With three or more
    ranks the grouping decides the order of additions, so a resumed run, whose first pass comes later, would
    differ in the last bits from one that was never interrupted. After this call every step uses the final one.
    """
    if not isinstance(trainee.model, DistributedDataParallel):
        return
    buffers = {name: buffer.clone() for name, buffer in trainee.net.named_buffers()}
    trainee.net.train()
    for _ in range(2):  # the second forward pass is where the buckets are rebuilt
        for batch, is_last in _with_last(loader.load(0, plan.stop)):
            with _no_sync(trainee.model, unless=is_last):
                (_loss_sum(plan, trainee, batch) + trainee.penalty()).backward()  # type: ignore[no-untyped-call]
    trainee.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in trainee.net.named_buffers():
            buffer.copy_(buffers[name])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch (all devices), NumPy and Python for one step of one rank."""
    digest = sha256(f"{seed}/{step}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:8], "little")
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def _loss_sum(plan: Plan, trainee: Trainee, batch: Batch) -> Tensor:
    columns = [column.to(trainee.device, non_blocking=True) for column in batch.columns]
    target = batch.target.to(trainee.device, non_blocking=True)
    with torch.autocast(trainee.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
        scores = trainee.model(*columns)
    return trainee.loss(scores, target).sum()


def _mean_loss(plan: Plan, trainee: Trainee, share: Tensor, step: int) -> float:
    total = share.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    mean = float(total + trainee.penalty().detach())
    if not np.isfinite(mean):
        raise TrainingFailed(
            f"the loss of step {step + 1} is {mean}; lower optimizer.lr, set clip_norm, or check the data for extremes"
        )
    return mean


def _epoch(plan: Plan, done: int) -> float:
    return min(done * plan.global_size, plan.stop) / plan.num_rows


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of ranks; (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _no_sync(model: nn.Module, unless: bool) -> AbstractContextManager[None]:
    if isinstance(model, DistributedDataParallel) and not unless:
        return model.no_sync()
    return nullcontext()


def _with_last(batches: list[Batch]) -> Iterator[tuple[Batch, bool]]:
    for number, batch in enumerate(batches, start=1):
        yield batch, number == len(batches)
