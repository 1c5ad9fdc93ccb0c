"""One optimizer step of one rank: micro-batches, forward and backward passes, gradients, update.

Each loss is summed and divided by the number of samples (or valid tokens, or the sum of weights) of the GLOBAL batch, so
that a step is the same on every layout.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from maas_ray.train.loop.auxiliary import split_output
from maas_ray.train.loop.gradients import add_penalty_gradient, align_gradients, clip_gradients, penalty
from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.modules.batch_statistics import frozen_statistics
from maas_ray.train.modules.dropout import samples
from maas_ray.train.modules.unused_parameters import UNEQUAL, unequal_use
from maas_ray.train.parallel.pipeline import MicroBatch


class Batches(Protocol):
    """Loads this rank's share of each global batch: a `Loader`, or one that reads ahead."""

    def load(self, cursor: int, stop: int) -> list[Batch]:
        """The micro-batches of global positions [cursor, min(cursor + global size, stop))."""
        ...


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
            with _sync(state.model, is_last, len(batches)):
                loss, auxiliary = _losses(plan, state, batch)
                scale = scale or coordinates.layout.dp / count()  # the first forward pass overlaps the wait
                loss = loss * scale
                if auxiliary is not None:
                    loss = loss + auxiliary * coordinates.layout.dp
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    # From the optimizer's lists: a traversal of all modules takes as long as a small layer.
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    if coordinates.layout.tp > 1:
        align_gradients(parameters)
    if state.l1 or state.l2:
        add_penalty_gradient(state.weights, state.l1, state.l2)
    norm = None
    if plan.max_grad_norm is not None:
        norm = clip_gradients(parameters, plan.max_grad_norm, coordinates.layout)
    state.optimizer.step()
    state.schedule.step()
    if state.average is not None:
        state.average.update(step + 1)
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
        batches = loader.load(0, plan.stop)
        for batch, is_last in _with_last(batches):
            with _sync(state.model, is_last, len(batches)):
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


def _sync(model: nn.Module, is_last: bool, num_batches: int) -> AbstractContextManager[None]:
    """Exchanges gradients once per step, with the last micro-batch."""
    if num_batches == 1:
        return nullcontext()  # the default; to set it again, FSDP2 would traverse all modules
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    return nullcontext()


def _with_last(batches: list[Batch]) -> Iterator[tuple[Batch, bool]]:
    for number, batch in enumerate(batches, start=1):
        yield batch, number == len(batches)
