"""One rank of a run: builds its part, loads the newest committed state and trains. Independent of ray.train.

Kept apart from train/run.py so that the processes that train import only what training needs.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.checkpoint.collectives import saving_group
from maas_ray.checkpoint.save import Snapshot
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.data.table.data_profile import data_lines
from maas_ray.errors import MaasError, TrainingFailed
from maas_ray.store.lease import Claim
from maas_ray.store.manifest import Committed
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.callbacks.base import RunContext
from maas_ray.train.callbacks.load import build_callbacks
from maas_ray.train.loop.assemble import (
    build_batches,
    build_loader,
    build_plan,
    build_train_state,
    count_class_rows,
)
from maas_ray.train.loop.deterministic import use_deterministic_kernels
from maas_ray.train.loop.fit import LoopHooks, fit
from maas_ray.train.loop.nan_check import refuse_not_finite
from maas_ray.train.loop.progress import Progress
from maas_ray.train.loop.step import warm_up_buckets
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.modules.sharded import local
from maas_ray.train.optim.state import group_numbers
from maas_ray.train.parallel.collectives import decided_by_rank0, number_of_rank0
from maas_ray.train.parallel.mesh import rank_coordinates, refuse_far_groups
from maas_ray.train.ranks import process_group
from maas_ray.train.ranks.heartbeat import Pace
from maas_ray.train.ranks.initial_state import restore_newest
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.ranks.profiler import Profiler
from maas_ray.train.ranks.run_actor import TIMEOUT_S
from maas_ray.train.ranks.stopwatch import Stopwatch
from maas_ray.train.ranks.throughput_meter import Rates
from maas_ray.train.records.run_index import point_at
from maas_ray.train.records.runs import checkpoints_prefix, run_prefix
from maas_ray.train.records.training_log import TrainingLog
from maas_ray.train.spec.metrics import metrics_at
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import buffers_of, tensors_of
from maas_ray.train.validation.async_validation import AsyncValidator
from maas_ray.train.validation.hooks import async_validation, sync_validation

RANDOM = "seed-position"
"""Kind of random numbers, stored in checkpoints: derived from (seed, position of the sample), see
train/modules/dropout.py."""


_QUICK_S = 0.05


def train_rank(spec: TrainSpec, data_digest: str, actor: Any, device: torch.device, claim: Claim | None = None) -> None:
    """Trains the share of this process, in the default process group of torch.distributed if one exists.

    Ray starts the group again after any error, so one that would come again is put on the actor and ends the run.

    Args:
        spec: the run, with an absolute store.
        data_digest: the prepared data set.
        actor: an actor of `train/ranks/run_actor.py`.
        device: where this rank computes.
        claim: the lease in whose name checkpoints are committed.
    """
    if ray.get(actor.failure.remote(), timeout=TIMEOUT_S) is not None:
        return  # the last attempt failed for good: end without an error, so that Ray does not try once more
    rank = dist.get_rank() if dist.is_initialized() else 0
    timeout_s = spec.workers.timeout_s
    pace = Pace(
        lambda heartbeat: ray.get(actor.heartbeat.remote(heartbeat), timeout=timeout_s),
        process_group.attempt(),
        rank,
        notice=process_group.notice,
        patience_s=timeout_s,
    )
    has_left = False
    try:
        has_left = not RankTraining(spec, data_digest, actor, device, pace, claim).run()
    except MaasError as error:
        if not error.retryable:
            ray.get(actor.fail.remote(error), timeout=TIMEOUT_S)
        raise
    finally:
        pace.close(has_left=has_left)


class RankTraining(LoopHooks):
    """One attempt of a run on this rank: builds its part, loads the newest committed state and trains.

    Args:
        spec: the run, with an absolute store.
        data_digest: the prepared data set.
        actor: an actor of `train/ranks/run_actor.py`.
        device: where this rank computes.
        pace: reports the steps of this rank, and knows when all ranks leave.
        claim: the lease in whose name checkpoints are committed.
    """

    def __init__(
        self, spec: TrainSpec, data_digest: str, actor: Any, device: torch.device, pace: Pace, claim: Claim | None
    ) -> None:
        self._spec = spec
        self._actor = actor
        self._device = device
        self._pace = pace
        self._watch = Stopwatch("starting")
        torch.set_num_threads(spec.workers.cpus)
        use_deterministic_kernels(spec.deterministic)
        self._store = open_store(spec.storage)
        self._dataset = open_dataset(self._store, data_digest)
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        self._build()
        self._resume()
        self._prepare_saving(claim)

    def _build(self) -> None:
        """Builds model, optimizer and loader of this rank, checks that they fit, and waits for the run's record."""
        spec, num_rows = self._spec, self._dataset.num_rows["train"]
        coordinates = rank_coordinates(spec.parallelism.resolve(self._world), self._device.type)
        if coordinates.mesh is not None:
            process_group.bound_waits(coordinates.mesh, spec.workers.timeout_s)
        if not spec.parallelism.tp_across_nodes:
            refuse_far_groups(coordinates.layout, ray.get_runtime_context().get_node_id(), self._device)
        if self._is_first and not ray.get(self._actor.is_allowed.remote(), timeout=TIMEOUT_S):
            check_run(spec, self._dataset, self._store)
            ray.get(self._actor.found_fit.remote(), timeout=TIMEOUT_S)
        self._state = build_train_state(
            spec,
            self._dataset.features,
            num_rows,
            coordinates,
            self._device,
            class_rows=count_class_rows(spec, self._dataset),
        )
        self._plan, self._loader = (
            build_plan(spec, num_rows),
            build_loader(spec, self._dataset, coordinates, self._state.min_rows),
        )
        warm_up_buckets(self._plan, self._state, self._loader)
        _await_record(self._actor)

    def _resume(self) -> None:
        """Loads the newest committed state and creates everything that depends on its step."""
        spec = self._spec
        self._first_step, history, seconds = restore_newest(self._store, spec, self._state)
        self._watch.add(seconds)
        self._pace.committed(self._first_step)
        self._pace.begin(self._first_step)
        self._log = TrainingLog(history)
        self._callbacks = build_callbacks(spec.callbacks) if self._is_first else None
        self._validator = AsyncValidator(self._store, spec) if self._is_first and spec.validation.is_async else None
        self._stopper = spec.stopper()
        self._plateau = spec.plateau()
        self._follow_plateau()
        self._rates = Rates(spec, self._dataset.features, self._device, self._world)
        self._profiler = _profiler(spec, self._store)

    def _prepare_saving(self, claim: Claim | None) -> None:
        spec = self._spec
        self._checkpointer = AsyncCheckpointer(
            self._store,
            checkpoints_prefix(spec.run),
            group=saving_group(spec.checkpoint.timeout_s),
            timeout_s=spec.checkpoint.timeout_s,
            keep=spec.checkpoint.keep(),
            on_commit=self._committed,
            late=self._validator.metrics if self._validator is not None else None,
            fence=partial(claim.check, self._store) if claim is not None else None,
        )
        self._state.optimizer.register_step_pre_hook(lambda *_: self._checkpointer.staged())
        validate = sync_validation(spec, self._plan, self._dataset, self._state, self.report)
        if spec.validation.is_async:
            validate = async_validation(self._validator, self._plan, self._checkpointer, self._state, self.report)
        self._validate = validate
        self.validates = validate is not None

    def run(self) -> bool:
        """Trains; returns whether the run is done: False if this rank left early, everything committed."""
        spec, reason = self._spec, "failed"
        try:
            if self._validator is not None:
                there = list_checkpoints(self._store, checkpoints_prefix(spec.run))
                due = [step for step in there if self._plan.is_checkpoint(step - 1)]
                self._validator.resume(self._log.entries, due)
            if self._callbacks is not None:
                history = tuple(self._log.entries)
                self._callbacks.on_begin(
                    RunContext(
                        spec,
                        self._store,
                        self._first_step,
                        history,
                        partial(_parameters, self._state),
                        data_lines(self._dataset.profile, self._dataset.report),
                    )
                )
            self._watch.enter("training")
            with build_batches(spec, self._plan, self._loader, self._first_step, self._device) as batches:
                is_done = fit(self._plan, self._state, batches, self._first_step, self)
            self._checkpointer.wait(is_strict=True)  # the last state must be committed before a rank ends
            if is_done and spec.validation.is_async and self._validate is not None:
                # adds the metrics of that state
                self._validate(self._checkpointer.committed_step or self._first_step)
            reason = "finished" if is_done else "interrupted"
            return is_done
        finally:
            self._checkpointer.close()
            if self._validator is not None:
                self._validator.close()
            if self._callbacks is not None:
                self._callbacks.on_end(reason)  # type: ignore[arg-type]
            if self._profiler is not None:
                self._profiler.close()

    def begin_step(self, step: int) -> None:
        if self._profiler is not None:
            self._profiler.begin(step)

    def report(self, progress: Progress) -> None:
        if self._callbacks is None:
            return
        progress = self._rates.added_to(replace(progress, workers=self._world))
        self._log.add(progress)
        if progress.loss is not None:
            self._callbacks.on_step(progress)
        if progress.metrics:
            self._callbacks.on_validation(progress)
        self._actor.put.remote(progress)

    def validate(self, done: int) -> None:
        with self._watch.phase("validation"):
            if self._validate is not None:
                self._validate(done)
                self._follow_plateau()

    def _follow_plateau(self) -> None:
        """Sets the learning rate by the validations so far; rank 0 has the history."""
        if self._plateau is not None:
            scale = self._plateau.follow(self._log.entries) if self._is_first else 1.0
            self._state.schedule.set_scale(number_of_rank0(scale, self._device))

    def should_stop(self, is_validated: bool) -> bool:
        """Rank 0 has the history and decides; the others receive its decision."""
        stopper = self._stopper
        if stopper is None or (stopper.needs_validation and not is_validated):
            return False
        ends = self._is_first and stopper.follow(self._log.entries) is not None
        return decided_by_rank0(ends, self._device)

    def should_leave(self, done: int) -> bool:
        return self._pace.is_stop(done)

    def save(self, done: int) -> None:
        with self._watch.phase("checkpoints"):
            tensors = tensors_of(self._state)
            buffers = buffers_of(self._state)
            refuse_not_finite(tensors, done, self._device, buffers)
            history = self._log.entries if self._is_first else []
            numbers = group_numbers(self._state.optimizer)
            self._checkpointer.save(
                Snapshot(
                    step=done,
                    cursor=self._plan.position(done),
                    tensors=tensors,
                    meta={
                        **({"optimizer": numbers} if numbers else {}),
                        "layout": str(self._state.coordinates.layout),
                        "metrics": metrics_at(history, done),
                        "random": RANDOM,
                        "seconds": self._watch.seconds(),
                        "seed": self._spec.seed,
                    },
                    history=history,
                ),
                # A forward pass may change statistics; weights, their moments and averages change with an update only.
                steady=tensors.keys() - buffers,
            )

    def _committed(self, committed: Committed) -> None:
        """After each commit, on rank 0, in the thread that saves."""
        step = int(committed.meta["step"])
        self._pace.committed(step)
        point_at(self._store, committed.prefix)
        stopped = self._stopper is not None and self._stopper.reason is not None
        # Not a state that is committed because the ranks leave: an undisturbed run would have no metrics of it.
        if self._validator is not None and (self._plan.is_checkpoint(step - 1) or stopped):
            self._validator.start(step)
        if self._callbacks is not None:
            self._callbacks.on_checkpoint(step, committed.prefix)


def _profiler(spec: TrainSpec, store: ObstoreStore) -> Profiler | None:
    if spec.performance.profile is None:
        return None
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Profiler(
        spec.performance.profile, rank, lambda name, trace: store.put(f"{run_prefix(spec.run)}/profile/{name}", trace)
    )


def _await_record(actor: Any) -> None:
    """Waits for the run's record, so that no rank writes anything for a run that does not exist."""
    deadline = time.monotonic() + TIMEOUT_S
    while not ray.get(actor.is_allowed.remote(), timeout=TIMEOUT_S):
        if time.monotonic() > deadline:
            raise TrainingFailed(
                f"the run was not recorded within {TIMEOUT_S:g} s after its workers were ready; check that the program that "
                "started it still runs"
            )
        time.sleep(_QUICK_S)


def _parameters(state: TrainState) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """This rank's parts of the weights, and of the gradients of the latest step."""
    for part in state.parts:
        for name, parameter in part.named_parameters():
            yield name, local(parameter), local(parameter.grad) if parameter.grad is not None else None
