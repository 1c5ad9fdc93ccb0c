"""One rank of a run: builds its part, loads the newest committed state and trains. Independent of ray.train.

Separate from train/run.py so that training processes import only what they need.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.checkpoint.catalog import list_checkpoints, newest_checkpoint, open_checkpoint, read_saved
from maas_ray.checkpoint.collectives import saving_group
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.errors import MaasError, TrainingFailed
from maas_ray.store.lease import Claim
from maas_ray.store.manifest import Committed
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.loop.assemble import build_batches, build_loader, build_plan, build_train_state
from maas_ray.train.loop.fit import TrainState, fit, warm_up_buckets
from maas_ray.train.loop.gradients import local
from maas_ray.train.loop.nan_check import refuse_not_finite
from maas_ray.train.loop.progress import Progress
from maas_ray.train.parallel.collectives import rank0_says
from maas_ray.train.parallel.mesh import rank_coordinates, refuse_far_groups
from maas_ray.train.ranks import process_group
from maas_ray.train.ranks.heartbeat import Pace
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.ranks.profiler import Profiler
from maas_ray.train.ranks.run_actor import TIMEOUT_S
from maas_ray.train.ranks.stopwatch import Stopwatch
from maas_ray.train.ranks.throughput_meter import Rates
from maas_ray.train.records.run_index import point_at
from maas_ray.train.records.runs import checkpoints_prefix, run_prefix
from maas_ray.train.records.tensorboard import Journal
from maas_ray.train.spec.early_stopping import Stopper
from maas_ray.train.spec.metrics import metrics_at
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import MODEL, buffers_of, restore, tensors_of
from maas_ray.train.validation.async_validation import Beside
from maas_ray.train.validation.hooks import beside_training, between_steps

RANDOM = "seed-position"
"""Kind of random numbers, stored in checkpoints: derived from (seed, position of the sample), see
train/modules/dropout.py."""


_QUICK_S = 0.05


def train_rank(spec: TrainSpec, data_digest: str, actor: Any, device: torch.device, claim: Claim | None = None) -> None:
    """Trains the share of this process, in the default process group of torch.distributed if one exists.

    Ray restarts the group after any error, so that an error that would recur is stored in the actor and ends the run.

    Args:
        spec: the run, with an absolute store.
        data_digest: the prepared data set.
        actor: the actor of the run, see `train/ranks/run_actor.py`.
        device: device of this rank.
        claim: the lease under which checkpoints are committed.
    """
    if ray.get(actor.failure.remote(), timeout=TIMEOUT_S) is not None:
        return  # the last attempt had a fatal error: end without an error, so that Ray does not retry
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
        has_left = not _train(spec, data_digest, actor, device, pace, claim)
    except MaasError as error:
        if not error.retryable:
            ray.get(actor.fail.remote(error), timeout=TIMEOUT_S)
        raise
    finally:
        pace.close(has_left=has_left)


def _train(
    spec: TrainSpec, data_digest: str, actor: Any, device: torch.device, pace: Pace, claim: Claim | None
) -> bool:
    """Returns whether the run is done; False if this rank left early, with everything committed."""
    watch = Stopwatch("starting")
    torch.set_num_threads(spec.workers.cpus)
    torch.use_deterministic_algorithms(spec.deterministic)
    store = open_store(spec.storage)
    dataset = open_dataset(store, data_digest)
    num_rows = dataset.num_rows["train"]
    world = dist.get_world_size() if dist.is_initialized() else 1
    coordinates = rank_coordinates(spec.parallelism.resolve(world), device.type)
    if coordinates.mesh is not None:
        process_group.bound_waits(coordinates.mesh, spec.workers.timeout_s)
    if not spec.parallelism.tp_across_nodes:
        refuse_far_groups(coordinates.layout, ray.get_runtime_context().get_node_id(), device)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first and not ray.get(actor.is_allowed.remote(), timeout=TIMEOUT_S):
        check_run(spec, dataset, store)
        ray.get(actor.found_fit.remote(), timeout=TIMEOUT_S)
    state = build_train_state(spec, dataset.features, num_rows, coordinates, device)
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    warm_up_buckets(plan, state, loader)
    _await_record(actor)
    first_step, history, seconds = _restore(store, spec, state)
    watch.add(seconds)
    pace.committed(first_step)
    pace.begin(first_step)
    journal = Journal(store, spec.run, first_step, history) if is_first else None
    beside = Beside(store, spec) if is_first and spec.validation.is_async else None
    stopper = spec.stopper()

    def commit(committed: Committed) -> None:
        step = int(committed.meta["step"])
        pace.committed(step)
        point_at(store, committed.prefix)
        # Not for a checkpoint that is committed because the ranks leave: an uninterrupted run has no metrics of it.
        if beside is not None and (
            plan.is_checkpoint(step - 1) or (stopper is not None and stopper.reason is not None)
        ):
            beside.start(step)
        if journal is not None:
            journal.publish()

    checkpointer = AsyncCheckpointer(
        store,
        checkpoints_prefix(spec.run),
        group=saving_group(spec.checkpoint.timeout_s),
        timeout_s=spec.checkpoint.timeout_s,
        keep=spec.checkpoint.keep(),
        on_commit=commit,
        late=beside.metrics if beside is not None else None,
        fence=partial(claim.check, store) if claim is not None else None,
    )

    state.optimizer.register_step_pre_hook(lambda *_: checkpointer.staged())
    rates = Rates(spec, dataset.features, device, world)

    def report(progress: Progress) -> None:
        progress = replace(progress, workers=world)
        if journal is not None:
            progress = rates.added_to(progress)
            journal.write(progress)
            if _shows_histograms(spec, progress):
                journal.write_histograms(progress.step, _distributions(state))
            actor.put.remote(progress)

    validate = between_steps(spec, plan, dataset, state, report)
    if spec.validation.is_async:
        validate = beside_training(beside, plan, checkpointer, state, report)

    def validate_timed(done: int) -> None:
        with watch.phase("validation"):
            if validate is not None:
                validate(done)

    def checkpoint(done: int) -> None:
        with watch.phase("checkpoints"):
            save(done)

    def save(done: int) -> None:
        tensors = tensors_of(state)
        buffers = buffers_of(state)
        refuse_not_finite(tensors, done, device, buffers)
        history = journal.history if journal is not None else []
        checkpointer.save(
            Snapshot(
                step=done,
                cursor=min(done * plan.global_size, plan.stop),
                tensors=tensors,
                meta={
                    "layout": str(coordinates.layout),
                    "metrics": metrics_at(history, done),
                    "random": RANDOM,
                    "seconds": watch.seconds(),
                    "seed": spec.seed,
                },
                history=history,
            ),
            # A forward pass can change statistics; weights, their moments and averages change only with an update.
            steady=tensors.keys() - buffers,
        )

    profiler = _profiler(spec, store)
    try:
        if beside is not None:
            there = list_checkpoints(store, checkpoints_prefix(spec.run))
            beside.resume(history, [step for step in there if plan.is_checkpoint(step - 1)])
        watch.enter("training")
        with build_batches(spec, plan, loader, first_step, device) as batches:
            is_done = fit(
                plan,
                state,
                batches,
                first_step,
                report=report,
                checkpoint=checkpoint,
                validate=validate_timed if validate is not None else None,
                stop=_stop(stopper, journal, device),
                leaves=pace.is_stop,
                begin=profiler.begin if profiler is not None else None,
            )
        checkpointer.wait(is_strict=True)  # the last state must be committed before any rank leaves
        if is_done and spec.validation.is_async and validate is not None:
            validate(checkpointer.committed_step or first_step)  # reports the metrics of that state
        return is_done
    finally:
        checkpointer.close()
        if beside is not None:
            beside.close()
        if journal is not None:
            journal.close()
        if profiler is not None:
            profiler.close()


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
                f"the run's record was not created within {TIMEOUT_S:g} s after its workers were ready; check whether "
                "the program that started the run is still running"
            )
        time.sleep(_QUICK_S)


def _restore(
    store: ObstoreStore, spec: TrainSpec, state: TrainState
) -> tuple[int, list[dict[str, Any]], dict[str, float]]:
    """Loads the newest committed state, if any; returns the number of completed steps, the history and the times.

    Rank 0 chooses it: the listings of two ranks can differ by a commit of an ending attempt.
    """
    prefix = checkpoints_prefix(spec.run)
    newest = torch.tensor([newest_checkpoint(store, prefix) or 0], device=state.device)
    if dist.is_initialized():
        dist.broadcast(newest, src=0)
    if not int(newest):
        if spec.init is not None:
            load_start(store, spec, state)
        return 0, [], {}
    committed = open_checkpoint(store, prefix, int(newest))
    saved = read_saved(committed)
    restore(state, saved.step, read_index(committed), lambda tensors: load_into(committed, tensors))
    return saved.step, saved.history, saved.meta.get("seconds", {})


def load_start(store: ObstoreStore, spec: TrainSpec, state: TrainState) -> None:
    """Loads the initial weights of the spec's `init`, if set."""
    from maas_ray.train.state.warm_start import open_start  # late: few runs need it

    if spec.init is None:
        return
    start = open_start(spec.init, store, spec.storage)
    weights = {name.removeprefix(MODEL): tensor for name, tensor in tensors_of(state).items() if name.startswith(MODEL)}
    start.check(spec.model, weights)
    start.load(weights)
    if state.ema is not None:
        state.ema.update(0)


def _stop(stopper: Stopper | None, journal: Journal | None, device: torch.device) -> Callable[[bool], bool] | None:
    """Returns the early-stopping function: rank 0 has the history, decides and broadcasts the decision."""
    if stopper is None:
        return None

    def stop(is_validated: bool) -> bool:
        if stopper.needs_validation and not is_validated:
            return False
        ends = journal is not None and stopper.follow(journal.history) is not None
        return rank0_says(ends, device)

    return stop


def _shows_histograms(spec: TrainSpec, progress: Progress) -> bool:
    every = spec.tensorboard.histograms_every
    return every is not None and progress.loss is not None and progress.step // spec.log_every % every == 0


def _distributions(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """This rank's parts of the weights, and of the gradients of the latest step."""
    for part in state.parts:
        for name, parameter in part.named_parameters():
            yield f"weights/{name}", local(parameter)
            if parameter.grad is not None:
                yield f"gradients/{name}", local(parameter.grad)
